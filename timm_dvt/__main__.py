"""The command line: runs a verb, and makes exit codes of what goes wrong."""

import os
import sys
from collections.abc import Sequence

from timm_dvt.errors import UserError, memory_words, too_little_memory
from timm_dvt.verbs import parser_for


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the person can put right (one line on stderr), 130."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser_for(argv).parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MemoryError, RuntimeError) as e:
        if not too_little_memory(e):
            raise
        print(f"error: {memory_words(e)}", file=sys.stderr)
        return 2
    except OSError as e:  # a folder that is read-only, a disk that is full
        print(f"error: {e.filename or 'a file'}: {e.strerror or e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
