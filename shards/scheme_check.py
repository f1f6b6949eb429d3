"""Is a label scheme sound? Asked of schemes that users and other tools' files bring; the packaged ones pass."""

import re

from mstkd.shards.spec import LABEL_SCHEMES, LabelScheme

LARGEST_VALUE = 255  # label maps are stored as uint8


def check_scheme(scheme: LabelScheme) -> None:
    """Raise ValueError, naming the first problem, unless the scheme can be stored, scored and painted back.

    Painting back: a label map turned into its regions and painted region by region, as a prediction is, must hold
    the same regions; otherwise not even a perfect prediction would score 1.
    """
    if scheme.name in LABEL_SCHEMES and scheme != LABEL_SCHEMES[scheme.name]:
        raise ValueError(f"label scheme {scheme.name!r} is a packaged one; give yours another name")
    if len(set(scheme.values)) < len(scheme.values) or 0 not in scheme.values:
        raise ValueError(f"values {_listed(scheme.values)}: each value once, 0 (background) among them")
    if outside := [value for value in scheme.values if not 0 <= value <= LARGEST_VALUE]:
        raise ValueError(f"values: {outside[0]} is outside 0..{LARGEST_VALUE}; map it to a smaller one with label_map")
    if not scheme.regions:
        raise ValueError("regions: name at least one")
    for region, values in scheme.regions.items():
        _check_region(region, values, scheme)
    if set(scheme.paint) != set(scheme.regions):
        raise ValueError(f"paint: needs exactly the regions {', '.join(scheme.regions)}")
    if strange := [region for region, value in scheme.paint.items() if value not in scheme.values]:
        raise ValueError(f"paint.{strange[0]}: {scheme.paint[strange[0]]} is not one of values {_listed(scheme.values)}")
    for value in scheme.values:
        _check_painted(value, scheme)


def _check_region(region: str, values: tuple[int, ...], scheme: LabelScheme) -> None:
    if not re.fullmatch("[A-Za-z0-9_-]+", region):
        raise ValueError(f"region name {region!r}: use letters, digits, _ and -")
    if not values or 0 in values or len(set(values)) < len(values):
        raise ValueError(f"regions.{region}: name values above 0, each once")
    if unknown := [value for value in values if value not in scheme.values]:
        raise ValueError(f"regions.{region}: {unknown[0]} is not one of values {_listed(scheme.values)}")


def _check_painted(value: int, scheme: LabelScheme) -> None:
    wanted = [region for region, values in scheme.regions.items() if value in values]
    painted = scheme.paint[wanted[-1]] if wanted else 0
    found = [region for region, values in scheme.regions.items() if painted in values]
    if found != wanted:
        raise ValueError(
            f"paint: a voxel of value {value} is in {_named(wanted)} and would be painted {painted}, which is in {_named(found)}; "
            "order the regions from the outermost to the innermost and paint each with a value that is in it and in no later one"
        )


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


def _named(regions: list[str]) -> str:
    return " and ".join(regions) or "no region"
