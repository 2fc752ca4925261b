"""All networks by name, by configuration and by a file's tensors: DiMR's (dimr.py) and those that
the paper compares with (peers.py). Whoever builds or reads a network asks here, and needs not know
which kind it is."""

import dataclasses

import torch
from torch import Tensor

import diffusion
import dimr
import peers
import schema
from schema import fields, flag, many, text, whole

Config = dimr.Config | peers.PeerConfig
Network = dimr.DiMR | peers.Peer

VARIANTS = {**dimr.VARIANTS, **peers.VARIANTS}

# Bounds of what a file may claim: far beyond any network, and built in seconds. The rest of what a
# configuration has to be is the networks' own to say.
_SIDE = whole(1, 2**14)
_BLOCKS = whole(1, 1000)
_WIDTH = whole(1, 2**17)
_COMMON = {
    "size": _SIDE,
    "channels": whole(1, 2**10),
    "heads": whole(1, 2**12),
    "num_classes": whole(1, 10**7),
    "null_class": flag,
    "space": text(),
}
_DIMR = fields(
    {**_COMMON, "layers": many(_BLOCKS, 1, 8), "dims": many(_WIDTH, 1, 8)},
    {
        "norm": text(),
        "mlp": text(),
        "kinds": many(text(), 0, 8),
        "objective": text(),
        "schedule": text(),
    },
)
_PEER = fields(
    {**_COMMON, "kind": text(), "patch": _SIDE, "width": _WIDTH, "depth": _BLOCKS},
    {"convolution": flag, "learned_variance": flag},
)

# A peer's fields under the names that the command line has for a network's. The first two are one
# number each, since a peer has no branches.
OPTIONS = {"kinds": "blocks"}  # fields whose option is called otherwise
PEER_FIELDS = {"layers": "depth", "dims": "width", "heads": "heads", "patch": "patch"}


def kind(config: Config) -> str:
    """ "dimr", or which of the peers it is."""
    return getattr(config, "kind", "dimr")


def config_of(record: dict) -> Config:
    """The configuration that a file has written down. Raises ValueError or TypeError where it makes
    no network."""
    schema.check(record, fields({}))
    if "kind" in record:
        schema.check(record, _PEER)
        return peers.PeerConfig(**record)
    schema.check(record, _DIMR)
    config = dimr.Config(**record)
    for name, table in (
        (config.objective, diffusion.OBJECTIVES),
        (config.noise_schedule, diffusion.SCHEDULES),
    ):
        if name not in table:
            raise ValueError(f"{schema.brief(name)} is not one of {', '.join(table)}")
    return config


def blocks(config: Config) -> int:
    """How many blocks a network has: as many tensors are the least it can be made of."""
    return config.depth if kind(config) != "dimr" else sum(config.blocks)


def tokens(config: Config) -> list[tuple[int, int, int]]:
    """(blocks, tokens, width) of each branch, of which a peer has one."""
    if kind(config) != "dimr":
        return [(config.depth, config.grid**2, config.width)]
    shapes = zip(config.blocks, config.grids, config.dims, strict=True)
    return [(count, grid**2, width) for count, grid, width in shapes]


def least_bytes(config: Config, training: bool = False) -> int:
    """Bytes of memory that an image takes at the very least on its way through the network: what
    goes into a block and what its MLP makes of it, in half precision; in training of every block
    what goes into it."""
    widest = max(count * width for _, count, width in tokens(config))
    kept = widest
    if training:
        kept = sum(blocks * count * width for blocks, count, width in tokens(config))
    image = config.channels * config.size**2
    return 2 * (kept + 4 * widest) + 4 * 4 * image


def new(config: Config) -> Network:
    """A network with fresh weights."""
    if kind(config) == "dimr":
        return dimr.DiMR(config)
    return peers.NETWORKS[config.kind](config)


def blank(config: Config) -> Network:
    """A network without numbers, on the meta device: what it is made of, in no memory."""
    with torch.device("meta"):
        return new(config)


def from_config(config: Config, tensors: dict[str, Tensor]) -> Network:
    """The network of `config` holding the tensors themselves, in eval mode. Raises ValueError
    naming every unknown, missing or misshapen tensor."""
    if kind(config) == "dimr":
        return dimr.from_config(config, tensors)
    return peers.from_config(config, tensors)


def from_released(
    tensors: dict[str, Tensor],
    kind: str | None = None,
    heads: int | None = None,
    config: Config | None = None,
) -> Network:
    """A network in eval mode from a file under its authors' names. `kind` and `heads` are told
    where no tensor tells them; `config`, where it is known, overrules them (DiMR alone).

    Raises ValueError: for what has to be told, naming the option, or naming every tensor at
    fault."""
    if any(name.startswith("stages.") for name in tensors):
        if kind is not None:
            raise ValueError(f"--kind {kind}: these are a DiMR's tensors; leave --kind out")
        return dimr.from_released(tensors, heads or 16, config=config)
    if peers.recognises(tensors):
        return peers.from_state_dict(tensors, kind, heads)
    raise ValueError(
        f"its {len(tensors)} tensors are no DiMR's, U-ViT's, DiT's or SiT's: no name begins with "
        "'stages.' or 'in_blocks.' or has the form 'blocks.0.adaLN_modulation.…'"
    )


def has_variance(config: Config) -> bool:
    """Whether the network has learned its variance, as the released DiT has."""
    return getattr(config, "learned_variance", False)


def variants(space: str) -> list[str]:
    """Names of the variants that work in this space ("latent" or "pixel")."""
    return [name for name, config in VARIANTS.items() if config.space == space]


def in_space(config: Config, space: str) -> Config:
    """A variant's configuration for data of `space`. A peer's serves in either, with its own noise
    schedule there; DiMR's are each for one, and stay as they are."""
    if kind(config) == "dimr":
        return config
    return dataclasses.replace(config, space=space)


def changed(config: Config, changes: dict, **fields) -> Config:
    """`config` with `fields`, and the user's `changes` under the names of the command line (layers,
    dims, heads, patch, norm, mlp, objective).

    Raises ValueError for what such a network does not have and for what makes none."""
    known = {field.name: field.name for field in dataclasses.fields(dimr.Config)}
    if kind(config) != "dimr":
        known = PEER_FIELDS
        if config.learned_variance:
            fields["learned_variance"] = False  # training here leaves it out
    strange = [f"--{OPTIONS.get(name, name)}" for name in changes if name not in known]
    if strange:
        options = [name for name in PEER_FIELDS if name in known]
        raise ValueError(
            f"{' and '.join(strange)} is not for this kind, {kind(config)}; of its shape "
            f"{', '.join(f'--{name}' for name in options)} can be chosen"
        )
    for name, value in changes.items():
        fields[known[name]] = value
        if known[name] in ("depth", "width"):
            fields[known[name]] = _only(name, value)
    return dataclasses.replace(config, **fields)


def _only(name, values):
    """The one number of `values`."""
    if len(values) != 1:
        given = ",".join(map(str, values))
        raise ValueError(f"--{name} {given} has {len(values)} numbers, and this network one branch")
    return values[0]
