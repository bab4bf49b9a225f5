"""Token files made by others become a store, and a store becomes files for others. No token is encoded again.

    Megatron-LM, GPT-NeoX   NAME.bin and NAME.idx        data.indexed tells their layout; a document may have several sequences
    datatrove               NAME.ds                      tokens, uint16 or uint32
                            NAME.ds.index                u64[documents]: where each document ends, in tokens
                            NAME.ds.metadata             three lines for people: tokenizer and bytes a token, tokens, tokens

What is taken in keeps its bytes: a `.bin` of the store is a hard link to the file of tokens where the file system allows it, else
a copy, and only the index beside it is new. So other files must not be written to after that; `rorqual data verify` would see it.
"""

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tokenizers

from data.checked import CHUNK, of_prefix, seal
from data.errors import DataError
from data.files import replace_file
from data.indexed import HEADER, Indexed, Tokens, token_dtype, write_index
from data.manifest import SPLITS, Manifest, SourceSpan, SplitRecord
from data.mapped import map_file
from data.store import Store, record_files
from data.tokenizer import copy_folder, decode, eos_token_id, fingerprint, token_bytes, vocab_size

Format = Literal["megatron", "datatrove"]


@dataclass(frozen=True)
class ForeignSource:
    """Files that become one source of a store, in this order.

    A path is a `.ds` file, a Megatron prefix (with or without `.bin`), or a folder, which stands for its files by name.
    """

    name: str
    train: Sequence[Path]
    validation: Sequence[Path] = ()
    weight: float = 1.0


def import_store(
    sources: Sequence[ForeignSource], tokenizer: Path | str, out: Path | str, validation: float = 0.0
) -> Store:
    """Make a store of token files that others wrote.

    Args:
        sources: the files, with the name and weight of each source.
        tokenizer: the Hugging Face tokenizer folder that they were encoded with.
        out: folder of the store; must be empty or new.
        validation: share of the documents of a source without validation files, taken from its end; at least one document
            where it is above 0. The file that is cut there is copied.

    Raises:
        DataError: a file cannot be read, its ids are not those of the tokenizer, or its documents are not ended by its
            end-of-sentence token.
    """
    tokenizer, out = Path(tokenizer), Path(out)
    _check_request(sources, out, validation)
    read = {"train": [_open_all(source.train) for source in sources]}
    read["validation"] = [_open_all(source.validation) for source in sources]
    for number, source in enumerate(sources):
        if validation and not source.validation:
            cut = _cut(source, read["train"][number], validation)
            read["train"][number], read["validation"][number] = cut
    texts = _Texts(tokenizer)
    sizes = {split: [sum(map(texts.check, files)) for files in of_sources] for split, of_sources in read.items()}
    dtypes = {file.tokens.dtype for of_sources in read.values() for files in of_sources for file in files}
    dtype = dtypes.pop() if len(dtypes) == 1 else token_dtype(texts.vocab_size)
    try:
        copy_folder(tokenizer, out / "tokenizer")
        splits = {split: _write_split(out, split, sources, read[split], sizes[split], dtype) for split in SPLITS}
        _manifest(out, sources, validation, splits, dtype).write(out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return Store.open(out)


def export_store(store: Store, out: Path | str, format: Format) -> list[Path]:
    """Lay out a store's tokens as others expect them, hard-linked where the file system allows it.

    Megatron-LM and GPT-NeoX read the store's own files as they are; `megatron` only links them.

    Returns:
        The token files without their endings for `megatron`, the `.ds` files for `datatrove`.

    Raises:
        DataError: `out` is not empty, or the tokens are of a type that the format does not have.
    """
    out = Path(out)
    _check_empty(out)
    dtype = np.dtype(store.manifest.dtype)
    if format == "datatrove" and dtype not in (np.dtype(np.uint16), np.dtype(np.int32)):
        raise DataError(
            f"{store.path}: tokens are {dtype.name}; datatrove has uint16 and uint32; export it as megatron"
        )
    out.mkdir(parents=True, exist_ok=True)
    copy_folder(store.tokenizer_folder, out / "tokenizer")
    written = []
    for split in SPLITS:
        for prefix, piece in zip(store.manifest.splits[split].pieces, store.split(split).pieces):
            if format == "megatron":
                for ending in (".bin", ".idx"):
                    _link(store.path / f"{prefix}{ending}", out / f"{prefix}{ending}")
                written.append(out / prefix)
            else:
                written.append(out / f"{prefix}.ds")
                _link(store.path / f"{prefix}.bin", written[-1])
                _write_datatrove(written[-1], piece, dtype.itemsize)
    return written


@dataclass(frozen=True)
class _File:
    """Documents of a foreign file: all of them, or those that follow one another between two places."""

    path: Path  # of the tokens
    tokens: Tokens  # [tokens]
    lengths: npt.NDArray[np.int64]  # [documents] tokens of each, none of them 0
    whole: bool = True

    def part(self, first: int, last: int) -> "_File":
        """Documents [first, last)."""
        start, stop = int(self.lengths[:first].sum()), int(self.lengths[:last].sum())
        return replace(self, tokens=self.tokens[start:stop], lengths=self.lengths[first:last], whole=False)


def _open_all(paths: Sequence[Path]) -> list[_File]:
    """The files behind paths, without those that hold no document."""
    return [file for path in paths for file in _open(Path(path)) if len(file.lengths)]


def _open(path: Path) -> Iterator[_File]:
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if file.suffix in (".ds", ".bin"))
        if not inside:
            raise DataError(f"{path}: holds no .ds and no .bin file; give the folder or the files with the tokens")
        for file in inside:
            yield from _open(file)
    elif path.suffix == ".ds":
        yield _open_datatrove(path)
    else:
        yield _open_megatron(path.with_suffix("") if path.suffix in (".bin", ".idx") else path)


def _open_megatron(prefix: Path) -> _File:
    """A pair `.bin`/`.idx`; the sequences of a document become one."""
    indexed = Indexed(prefix, is_sealed=False)
    path, index = of_prefix(prefix, "bin"), of_prefix(prefix, "idx")
    count = indexed.document_count
    with index.open("rb") as file:
        documents = HEADER.unpack(file.read(HEADER.size))[4]
        file.seek(HEADER.size + 12 * count)
        first = np.frombuffer(file.read(8 * documents), "<i8")  # sequence of each document, and the number of sequences
    ends = np.concatenate([[0], np.cumsum(indexed.lengths(0, count), dtype=np.int64)])
    if not np.array_equal(indexed.pointers(0, count), ends[:-1] * indexed.dtype.itemsize):
        raise DataError(f"{path}: its sequences do not follow one another; write it again with Megatron's builder")
    if not len(first) or first[0] != 0 or first[-1] != count or (np.diff(first) < 0).any():
        raise DataError(
            f"{index}: its documents do not cover its {count} sequences; "
            "end each with end_document() or add_document() and write it again"
        )
    lengths = np.diff(ends[first])
    return _File(path, indexed.read(0, indexed.token_count), lengths[lengths > 0])


def _open_datatrove(path: Path) -> _File:
    """A `.ds` file with its index. The size of a token is what makes its last document end where the file does."""
    index = path.with_name(f"{path.name}.index")
    for file in (path, index):
        if not file.is_file():
            raise DataError(
                f"{file}: missing; the ends of the documents are needed; let DocumentTokenizer write it: save_index=True"
            )
    ends = np.fromfile(index, "<u8").astype(np.int64)
    size, count = path.stat().st_size, int(ends[-1]) if len(ends) else 0
    dtypes: dict[int, np.dtype[Any]] = {2 * count: np.dtype(np.uint16), 4 * count: np.dtype(np.int32)}
    dtype = dtypes.get(size)  # no id reaches the highest bit of an uint32
    if dtype is None or (np.diff(ends) < 0).any():
        raise DataError(
            f"{path}: {size} bytes; its index says {count} tokens of 2 or 4 bytes; copy both files again, or write them again"
        )
    lengths = np.diff(ends, prepend=0)
    return _File(path, map_file(path, dtype, count), lengths[lengths > 0])


class _Texts:
    """What the tokenizer says of a file: whether its ids can be its own, and how much text they stand for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vocab_size = vocab_size(folder)
        self._end = eos_token_id(folder)
        self._bytes = token_bytes(folder)

    def check(self, file: _File) -> int:
        """UTF-8 bytes of a file's text, after a look at each of its tokens."""
        size = 0
        for start in range(0, len(file.tokens), CHUNK):
            chunk = file.tokens[start : start + CHUNK]
            if chunk.min() < 0 or chunk.max() >= self.vocab_size:
                raise DataError(
                    f"{file.path}: token id {int(chunk.max())}; the tokenizer {self.folder} has ids 0 to {self.vocab_size - 1}; "
                    "give the tokenizer that the file was made with"
                )
            size += int(self._bytes[chunk].sum())
        last = file.tokens[np.cumsum(file.lengths) - 1]
        if (wrong := np.flatnonzero(last != self._end)).size:
            raise DataError(
                f"{file.path}: document {wrong[0]} ends with token {int(last[wrong[0]])}; every document must end with "
                f"{self._end} ({decode(self.folder, [self._end])}); make the file with Megatron's --append-eod, or datatrove's "
                "DocumentTokenizer(eos_token=…) without shuffle_chunk_size"
            )
        return size


def _cut(source: ForeignSource, files: list[_File], share: float) -> tuple[list[_File], list[_File]]:
    """Files of the train split, and those of the validation split: the last documents."""
    documents = sum(len(file.lengths) for file in files)
    left = documents - max(round(documents * share), 1)
    if left < 1:
        raise DataError(
            f"validation = {share}: leaves none of the {documents} documents of {source.name} to train on; lower it"
        )
    train, validation = [], []
    for file in files:
        here = min(max(left, 0), len(file.lengths))
        if here == len(file.lengths):
            train.append(file)
        elif here == 0:
            validation.append(file)
        else:
            train.append(file.part(0, here))
            validation.append(file.part(here, len(file.lengths)))
        left -= len(file.lengths)
    return train, validation


def _write_split(
    out: Path,
    split: str,
    sources: Sequence[ForeignSource],
    of_sources: list[list[_File]],
    sizes: list[int],
    dtype: np.dtype[Any],
) -> SplitRecord:
    """Place the files of a split; a file becomes a piece."""
    files = [file for files in of_sources for file in files] or [
        _File(out, np.zeros(0, dtype), np.zeros(0, np.int64), False)
    ]
    pieces = [split] if len(files) == 1 else [f"{split}-{number:05d}" for number in range(len(files))]
    for file, piece in zip(files, pieces):
        _place(file, out / f"{piece}.bin", dtype)
        write_index(out / piece, file.lengths, dtype)
    spans = [
        SourceSpan(
            name=source.name,
            weight=source.weight,
            documents=sum(len(file.lengths) for file in own),
            tokens=sum(len(file.tokens) for file in own),
            bytes=size,
        )
        for source, own, size in zip(sources, of_sources, sizes)
    ]
    return SplitRecord.of(spans, pieces)


def _place(file: _File, target: Path, dtype: np.dtype[Any]) -> None:
    """Bring a file's tokens into the store."""
    if file.whole and file.tokens.dtype == dtype:
        _link(file.path, target)
        return
    with replace_file(target) as temporary, temporary.open("wb") as written:
        for start in range(0, len(file.tokens), CHUNK):
            written.write(np.ascontiguousarray(file.tokens[start : start + CHUNK], dtype).data)


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy of it on another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        with replace_file(target) as temporary:
            shutil.copyfile(source, temporary)


def _write_datatrove(path: Path, piece: Indexed, token_size: int) -> None:
    """What stands beside a `.ds` file."""
    ends = np.cumsum(piece.lengths(0, piece.document_count), dtype="<u8")
    lines = (f"tokenizer/tokenizer.json|{token_size}", str(piece.token_count), f"{piece.token_count / 1e6:.3g} MT")
    with replace_file(path.with_name(f"{path.name}.index")) as temporary:
        temporary.write_bytes(ends.tobytes())
    with replace_file(path.with_name(f"{path.name}.metadata")) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def _manifest(
    out: Path, sources: Sequence[ForeignSource], validation: float, splits: dict[str, SplitRecord], dtype: np.dtype[Any]
) -> Manifest:
    folder = out / "tokenizer"
    files = {f"tokenizer/{name}": record for name, record in record_files(folder).items()}
    for piece in (piece for split in splits.values() for piece in split.pieces):
        files |= seal(out / piece)
    asked = [
        {
            "name": source.name,
            "weight": source.weight,
            "train": [str(path) for path in source.train],
            "validation": [str(path) for path in source.validation],
        }
        for source in sources
    ]
    return Manifest(
        dtype=dtype.name,
        vocab_size=vocab_size(folder),
        eos_token_id=eos_token_id(folder),
        tokenizer_fingerprint=fingerprint(folder),
        splits=splits,
        files=dict(sorted(files.items())),
        steps=[{"step": "import"}],
        versions={"numpy": np.__version__, "tokenizers": tokenizers.__version__},
        recipe={"sources": asked, "validation": validation},
    )


def _check_request(sources: Sequence[ForeignSource], out: Path, validation: float) -> None:
    _check_empty(out)
    if not sources or not all(source.train for source in sources):
        raise DataError("sources: each needs files to train on; give at least one")
    name, count = Counter(source.name for source in sources).most_common(1)[0]
    if count > 1:
        raise DataError(f"source name {name!r} is used {count} times; give each source its own name")
    for source in sources:
        if not 0 < source.weight < math.inf:
            raise DataError(f"source {source.name}: weight = {source.weight}: must be a number above 0")
    if not 0 <= validation < 1:
        raise DataError(f"validation = {validation}: must be a share of the documents, from 0 to below 1")


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out = {out}: is not an empty folder; give a new one")
