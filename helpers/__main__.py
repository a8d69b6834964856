"""The command line: ``python -m helpers COMMAND``, see ``--help`` for the commands."""

import contextlib
import errno
import json
import os
import signal
import sys

from helpers.answers import answer_text
from helpers.cli.commands import build_parser
from helpers.errors import InputError, explain, printable

_REMEDIES = {
    errno.ENOSPC: "make room on the disk, or name a folder on another one",
    errno.EDQUOT: "make room on the disk, or name a folder on another one",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "check the permissions, or name another place",
    errno.EPERM: "check the permissions, or name another place",
    errno.ENAMETOOLONG: "choose a shorter name or path",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or set training.num_workers=0",
}


def main(arguments=None):
    """Run a command of a list of str, by default that of the process; return the exit status."""
    args = build_parser().parse_args(arguments)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints is no result
            from helpers.environment import quieten  # loads torch, which --help does not need

            quieten()
            status, document = args.function(args)
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            text = _as_json(document) if args.json else answer_text(args.command, document)
            print(text, flush=True)
        return status
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        _silence_stdout()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        problem = _as_input_error(error)
        if problem is None:
            raise
        if isinstance(error, OSError):
            _silence_stdout()  # a full disk behind stdout must not be tried again at exit
        print(f"error: {printable(problem)}".replace("\n", "\\n"), file=sys.stderr)
        return 2


def _as_input_error(error):
    """Return an InputError that says what was wrong and what mends it; None for a fault of our own."""
    if isinstance(error, OSError):
        fix = _REMEDIES.get(error.errno, "check the path and the disk")
        return InputError(error.strerror or str(error), where=error.filename, fix=fix)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        message = f"out of memory: {str(error) or 'no details'}".splitlines()[0]
        return InputError(message, fix="ask fewer prompts or images at once, or use --tile")
    return error if isinstance(error, InputError) else None


def _as_json(document):
    """Return the document as indented JSON; a number that JSON cannot hold is refused."""
    message = "the answer holds NaN or infinity, which JSON cannot express"
    fix = "look at it without --json; weights with NaN are the usual reason"
    with explain(ValueError, message, where=None, fix=fix):
        return json.dumps(document, indent=2, allow_nan=False)


def _silence_stdout():
    """Send what is still buffered for stdout nowhere, so that Python's exit does not fail."""
    with contextlib.suppress(OSError, ValueError):  # a replaced stdout may have no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets every `finally` clean up
    sys.exit(main())
