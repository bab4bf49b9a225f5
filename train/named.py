"""Files that come with the code under a name, beside those that a user gives by their path."""

import difflib
from pathlib import Path


def names(folder: Path, suffix: str) -> list[str]:
    """The names that there are."""
    return sorted(path.stem for path in folder.glob(f"*{suffix}"))


def find(name: str, folder: Path, suffix: str, kind: str) -> Path:
    """The file of that name in `folder`, else the one at that path.

    Args:
        kind: what a user may give instead of a name, for example "YAML file".

    Raises:
        LookupError: there is neither; its text is the rule and the fix.
    """
    known = names(folder, suffix)
    if name in known:
        return folder / f"{name}{suffix}"
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"give one of these or the path of a {kind}"
    raise LookupError(f"must be a file or one of {', '.join(known)}; {hint}")
