"""What the person at the keyboard, or who calls, can put right: each message names the thing and the remedy."""


class UserError(ValueError):
    """Wrong input, not a bug of ours: a command prints it as one line and ends with an exit code, no traceback."""


class UnsupportedModelError(UserError, TypeError):
    """A model that cannot do what is asked: have a denoiser, be saved, be distilled into.

    Attributes:
        reason: the why alone, where the message says more.
    """

    def __init__(self, message: str, reason: str = ""):  # noqa: B042  pickled with its message alone
        super().__init__(message)
        self.reason = reason or message


class ImageError(UserError):
    """An image that cannot be used."""


class CalibrationError(UserError):
    """A model or images that a denoiser cannot be calibrated with."""


class InspectionError(UserError):
    """A model or images that cannot be inspected."""


class FeaturesError(CalibrationError, InspectionError):
    """Features of a model that are not finite, whatever they are read for."""


class WeightsNotFoundError(UserError, RuntimeError):
    """Weights that cannot be had: of the wrong name, without a network, without access."""


def too_little_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch raises a RuntimeError for that, on a GPU too, which only its text tells apart."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def memory_words(error: BaseException) -> str:
    """What to say of an error of `too_little_memory`."""
    return f"too little memory; smaller numbers take less ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, of a length to print; and the next where it only leads to that."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return printable((f"{first} {more[0].strip()}" if first.endswith(":") and more else first)[:1000])


def printable(text: str) -> str:
    """A text with what a terminal would act on, as line ends and escape codes, written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
