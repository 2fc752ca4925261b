"""The command line. Options and help live here; the work is done by the jobs, imported only when run.

`dimr COMMAND` and `python -m cli COMMAND` are the same; `torchrun --nproc-per-node N -m cli COMMAND`
spreads train, encode, sample and eval over processes."""

import errno

import click

from storage import UserError

# What the machine refuses (full, read-only or forbidden storage) is foreseen; any other OSError is a bug of ours.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


class Group(click.Group):
    """Turns foreseen errors into one line on stderr and an exit status: 2 for bad usage, 1 for a failed job."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except UserError as error:
            raise click.ClickException(" ".join(str(error).split())) from None
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            raise click.ClickException(f"{error.filename or 'output'}: {error.strerror}; free space or choose another place") from None


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dimr")
def main():
    """DiMR: multi-resolution diffusion for class-conditional images (arXiv:2406.09416)."""


if __name__ == "__main__":
    main(prog_name="dimr")
