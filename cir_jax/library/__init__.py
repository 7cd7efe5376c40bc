"""One's own photos: a folder that is indexed once, kept fresh, and searched.

    from cir_jax.library import Library

    with Library("photos/", "slerp") as library:
        library.update()
        library.search(image="photos/dog.jpg", text="at night", k=5)

The command line is `cir` (`cir_jax.library.cli`).
"""

from typing import Any

__all__ = ["Library"]


def __getattr__(name: str) -> Any:
    if name == "Library":  # JAX is imported when it is needed
        from cir_jax.library.library import Library

        return Library
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
