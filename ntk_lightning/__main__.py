"""``python -m ntk_lightning``: the command line, which reports a user's mistake in one sentence at its end."""

from __future__ import annotations

import dis
import os
import sys
import traceback
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import distributed

from ntk_lightning.cli import main

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = (_PACKAGE, *(_PACKAGE.joinpath(name).resolve() for name in ("callbacks", "datamodules")))
_RESTORING = (os.path.join("torch", "serialization.py"), "checkpoint_connector.py")  # files of torch and Lightning


def explain(error: BaseException) -> str | None:
    """Say what the user can do about an error.

    Args:
        error: What ended a run.

    Returns:
        Its message where this package raised it on purpose, or Lightning did for the configuration; advice where a
        checkpoint could not be restored; None for anything else, which may be a bug and needs its traceback.
    """
    cause: BaseException | None = error
    while cause is not None:  # jsonargparse wraps what a constructor raises
        if isinstance(cause, MisconfigurationException) or _raised_here(cause):
            return str(cause.args[0] if isinstance(cause, KeyError) else cause)
        cause = cause.__cause__
    if any(frame.filename.endswith(_RESTORING) for frame in traceback.extract_tb(error.__traceback__)):
        return (
            f"The checkpoint cannot be restored ({type(error).__name__}): give --ckpt_path a whole checkpoint of the "
            "same model, or leave it out."
        )
    return None


def _raised_here(error: BaseException) -> bool:
    """Whether a ``raise`` statement of this package made the error, rather than something that went wrong."""
    # Whoever wrote a `raise` in this package thought of the mistake and wrote a message for it; any other error, also
    # one that Python raises inside this package (an index, a missing key), may be a bug and needs its traceback. The
    # type cannot tell the two apart: both are ValueError, TypeError, KeyError. An exception class of our own could, if
    # every `raise` of the package used it, in a second class for each of the built-in types that users may catch; so
    # the instruction is looked at where the error came from: RAISE_VARARGS is what a `raise` statement compiles to.
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised and any(Path(code.co_filename).resolve().is_relative_to(folder) for folder in _FOLDERS)


def run() -> None:
    """Run the command line; set ``NTK_LIGHTNING_TRACEBACK=1`` to see where a mistake was found."""
    try:
        main()
    except Exception as error:
        message = explain(error)
        if message is None or os.environ.get("NTK_LIGHTNING_TRACEBACK"):
            raise
        print("tip: To see where it happened set NTK_LIGHTNING_TRACEBACK=1", file=sys.stderr)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads can abort a process that exits with it


if __name__ == "__main__":
    run()
