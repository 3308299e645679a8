"""The files of a corpus, by language, in an order that does not depend on the file system.

A corpus argument is a folder whose sub-folders are languages, several such folders, or files and flat folders with
their language named.
"""

from __future__ import annotations

import re
from pathlib import Path

from ekiden.corpus.formats import FORMATS, SourceFile, file_format
from ekiden.corpus.hub import hub_files
from ekiden.errors import UserError
from ekiden.progress import say


def discover(
    corpus: list[str], language: str | None = None, commits: dict[str, str] | None = None
) -> dict[str, list[SourceFile]]:
    """Return the files of each language, both sorted by name.

    Args:
        corpus: folders with a sub-folder a language; with `language`, files and folders of that language;
            [LANGUAGE=]hf://datasets/OWNER/NAME[@config][:split].
        commits: of datasets on the hub, OWNER/NAME: commit, that an earlier start of the build read.

    Raises:
        UserError: something is missing, empty, or of no known language or format.
    """
    if language is not None and (not language or language.startswith(".") or "/" in language):
        raise UserError(
            f"--language {language!r} cannot name a folder; give a name without '/' that begins with no dot"
        )
    found: dict[str, list[SourceFile]] = {}
    for argument in corpus:
        path = Path(argument)
        if match := re.fullmatch(r"(?:([^/=.][^/=]*)=)?(hf://.*)", argument):
            name = match[1] or language
            if not name:
                raise UserError(
                    f"corpus {argument}: its language is not known; write LANGUAGE={argument}, or add --language"
                )
            found.setdefault(name, []).extend(hub_files(match[2], commits))
            continue
        if not path.exists():
            raise UserError(
                f"corpus {argument} does not exist; give a folder with a sub-folder a language, or files"
            )
        if path.is_file() or language:
            if not language:
                raise UserError(
                    f"corpus {argument} is a file and its language is not known; add --language NAME"
                )
            found.setdefault(language, []).extend(_files(path))
            continue
        loose = [child.name for child in sorted(path.iterdir()) if child.is_file() and file_format(child)]
        if loose:
            raise UserError(
                f"corpus {argument} holds {loose[0]} outside any language's folder; move it into {argument}/LANGUAGE/, or "
                "add --language NAME"
            )
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                files = _files(child)
                if files:
                    found.setdefault(child.name, []).extend(files)
    if not any(found.values()):
        raise UserError(
            f"corpus {' '.join(corpus)} holds no {', '.join(FORMATS)} file; give a folder with text"
        )
    return dict(sorted(found.items()))


def _files(path: Path) -> list[SourceFile]:
    """Return the readable files at or below `path`; hidden ones, and those in hidden folders, are left out."""
    if path.is_file():
        kind = file_format(path)
        if kind is None:
            raise UserError(f"corpus file {path} is none of {', '.join(FORMATS)}; convert or rename it")
        return [SourceFile(str(path), path.stat().st_size, kind, path.name)]
    found, skipped = [], []
    for file in sorted(path.rglob("*")):
        below = file.relative_to(path)
        # A notebook leaves a second copy of every file in .ipynb_checkpoints.
        if file.is_dir() or any(part.startswith(".") for part in below.parts):
            continue
        if not file.is_file():
            if file_format(file):
                what = "a link to what is not there" if file.is_symlink() else "no ordinary file"
                say(f"{path}: {below.as_posix()} is not read, being {what}")
            continue
        if kind := file_format(file):
            found.append(SourceFile(str(file), file.stat().st_size, kind, below.as_posix()))
        else:
            skipped.append(below.as_posix())
    if skipped:
        names = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        count = "1 file is" if len(skipped) == 1 else f"{len(skipped):,} files are"
        say(f"{path}: {count} not read, being none of {', '.join(FORMATS)}: {names}")
    return found
