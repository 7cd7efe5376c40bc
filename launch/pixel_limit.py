"""--max_megapixels, the flag of the binaries that decode images."""

from absl import flags

MAX_MEGAPIXELS = flags.DEFINE_float(
    "max_megapixels", 200.0, "Larger images are not decoded: they count as unreadable"
)


def apply() -> None:
    """Makes it the limit of this process. Raises DataError for none that is above 0."""
    from cir_jax.input import images

    images.limit(MAX_MEGAPIXELS.value)
