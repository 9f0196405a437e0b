"""The one exception for mistakes a user can correct. Knows nothing about where the message will be shown."""


class UserError(ValueError):
    """One clear sentence: what was given, what is allowed, what to do."""


class OutOfMemory(UserError):
    """A request that began and found no memory; nothing of it is left."""


# How torch's allocator says on the CPU that there is no memory, in a plain RuntimeError, and how C++ does.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python, numpy or torch say that there is no memory (on any device)."""
    if isinstance(error, OutOfMemory | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _NO_MEMORY)
    )
