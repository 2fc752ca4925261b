"""Several processes that train together, forked from one that has PyTorch loaded already; and what
tests let them do."""

import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import time
import weakref

import torch
import torch.distributed as dist
from conftest import free_port
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import cli
import dataset
import dimr
import networks
import parallel
import recipes
import storage
import training
import validation

COMPILE = torch.nn.Module.compile
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["training", "torch._dynamo", "ranks"])


class Ranks:
    """`count` processes that call a function of this module, their outputs in files of `folder`.
    They are ended on leaving the context."""

    def __init__(self, count, folder, function, *arguments):
        port = free_port()
        self.logs = []
        self.processes = []
        for rank in range(count):
            log = folder / f"{function.__name__}-{port}-{rank}.log"
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            call = (where, log, function, arguments)
            self.logs.append(log)
            self.processes.append(CONTEXT.Process(target=as_rank, args=call))

    def __enter__(self):
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()

    def alive(self):
        return all(process.is_alive() for process in self.processes)

    def end(self, seconds=120):
        """Wait for all; [(exit status, what it said)] in order of rank."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, until - time.monotonic()))
            assert process.exitcode is not None, self.said()
        statuses = [process.exitcode for process in self.processes]
        return list(zip(statuses, self.said(), strict=True))

    def said(self):
        return [log.read_text() for log in self.logs]


def as_rank(where, log, function, arguments):
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for name, value in where.items():
        os.environ[name] = str(value)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as at a user's
    function(*arguments)


def command(*arguments):
    """`dimr ARGUMENTS`."""
    cli.main(list(map(str, arguments)), prog_name="dimr")


# the layout of buckets


def lay_buckets(folder, data, choices):
    """Train for 2 steps and go on to 5, as each of `choices` changes the recipe, and print for each
    life the layout of every exchange of gradients: the names of the parameters in each bucket."""
    layouts = watch_buckets()
    compiling = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    torch.nn.Module.compile = compiling
    found = {}
    for name, choice in choices.items():
        found[name] = []
        for steps in (2, 5):
            layouts.clear()
            training.train(
                folder / name,
                training.Source(data, workers=0),
                variant="demo",
                recipe={"batch_size": 24, "steps": steps, **choice},
                network={"layers": (1, 1), "dims": (32, 16), "heads": 2},
                device="cpu",
                saving=training.Saving(sample_every=0),
                quiet=True,
            )
            found[name].append(list(layouts))
    if parallel.is_main():
        print(json.dumps(found))
    parallel.stop()


def watch_buckets():
    """A list that grows with each exchange, of buckets small enough for there to be several."""
    layouts = []
    wrapper = parallel.DistributedDataParallel
    dist._DEFAULT_FIRST_BUCKET_BYTES = 10_000

    def wrap(model, **keywords):
        names = {parameter: name for name, parameter in model.named_parameters()}
        model = wrapper(model, bucket_cap_mb=0.02, **keywords)

        def exchange(state, bucket):
            if bucket.index() == 0:
                layouts.append([])
            layouts[-1].append([names[parameter] for parameter in bucket.parameters()])
            return allreduce_hook(None, bucket)

        model.register_comm_hook(None, exchange)
        return model

    parallel.DistributedDataParallel = wrap
    return layouts


# reading checkpoints


class Reader:
    """`storage.open_tensors` for rank 0 alone; notes in `most` how many tensors were held at
    once."""

    held = weakref.WeakSet()
    most = 0

    def __init__(self, path):
        assert parallel.is_main(), "another process reads a checkpoint too"
        self.context = storage.open_tensors(path)

    def __enter__(self):
        self.file = self.context.__enter__()
        self.keys = self.file.keys
        self.get_slice = self.file.get_slice
        return self

    def __exit__(self, *error):
        return self.context.__exit__(*error)

    def get_tensor(self, name):
        tensor = self.file.get_tensor(name)
        Reader.held.add(tensor)
        Reader.most = max(Reader.most, len(Reader.held))
        return tensor


def resume(run, data):
    """Go on with a run, and print how many tensors of its checkpoint were held at once."""
    training.open_tensors = Reader
    training.train(
        run,
        training.Source(data, workers=0),
        device="cpu",
        saving=training.Saving(every=4, keep=0, sample_every=0),
        quiet=True,
    )
    parallel.stop()
    print(Reader.most)


# failing


def fail():
    """`dimr train` that fails on all processes, foreseen on rank 0 alone, beside a process group
    that can't be left."""

    def block():
        time.sleep(600)

    def train(*arguments, **keywords):
        parallel.start(torch.device("cpu"))
        parallel.barrier()
        if parallel.is_main():
            raise storage.UserError("it is foreseen")
        return 1 / 0

    dist.destroy_process_group = block
    training.train = train
    command("train", "--data", "x")


# averages of what is logged


def average():
    """Print whether a number's mean over processes depends on what else is averaged with it."""
    parallel.start(torch.device("cpu"))
    generator = torch.Generator().manual_seed(parallel.rank())
    rows = torch.randn(40, 5, generator=generator)
    together = parallel.mean(rows.clone())
    apart = torch.stack([parallel.mean(row.clone()) for row in rows])
    print(torch.equal(together, apart))
    print(float((together - apart).abs().max()))
    parallel.stop()


# the loss on held-out images


def validate(training_images, held_out):
    """Measure the loss of fresh weights, and print what is found, or refused, on each process."""
    parallel.start(torch.device("cpu"))
    torch.set_num_threads(1)
    data = dataset.open_data(training_images)
    recipe = recipes.Recipe(batch_size=12, precision="fp32", compile=False)
    state = training.State(
        training.new_network(recipes.configure(networks.VARIANTS["demo"], data, True), 0),
        recipe,
        torch.device("cpu"),
    )
    held = validation.HeldOut(held_out, data)
    try:
        facts, _ = validation.measure(state, held, workers=0)
    except storage.UserError as error:
        facts = {"refused": str(error)}
    print(json.dumps(facts))
    parallel.stop()


# compiling


def count_graphs():
    """Train a step of a network of 11 blocks as it is, compiled, and compiled with recomputation;
    print how many graphs that took and how far the gradients are from those of the first."""
    parallel.start(torch.device("cpu"))
    config = dataclasses.replace(dimr.VARIANTS["demo"], layers=(7, 4), dims=(16, 8))
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1000
    wrapper = parallel.DistributedDataParallel
    parallel.DistributedDataParallel = functools.partial(wrapper, bucket_cap_mb=0.005)
    gradients = {}
    graphs = {}
    for name in ("plain", "graphs", "recomputing"):
        recipe = recipes.Recipe(
            precision="fp32", compile=name != "plain", checkpoint_blocks=name == "recomputing"
        )
        gradients[name], graphs[name] = first_gradients(config, recipe)
    norm = gradients["plain"].norm()
    difference = max(float((g - gradients["plain"]).norm() / norm) for g in gradients.values())
    print(json.dumps({**graphs, "difference": difference}))
    parallel.stop()


def first_gradients(config, recipe):
    """Those of a step, and how many graphs it took. The state is gone before the processes part, as
    a command's is: what the group of processes still holds of it could keep its threads waiting."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    torch.nn.Module.compile = functools.partialmethod(COMPILE, backend=counter)
    state = training.State(training.new_network(config, 0), recipe, torch.device("cpu"))
    state.start(2)
    images = torch.arange(128, dtype=torch.uint8).reshape(2, 1, 8, 8)
    sums, _ = training.losses(state, images, torch.tensor([1, 2]), 2 * parallel.rank())
    sums.sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in state.parameters.values()])
    return gradients, counter.frame_count
