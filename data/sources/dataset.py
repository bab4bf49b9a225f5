"""Whatever the library `datasets` can load: a name on the Hugging Face Hub, a folder of files, a folder of `save_to_disk`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from data.documents import Document, Unreadable
from data.errors import DataError
from data.sources.base import Input
from data.sources.fields import FieldsSource

SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves in a folder


class HubDataset(FieldsSource):
    """One split of a data set, one document a row. Its shards are read apart, so that processes can share them.

    How much memory a shard takes is the library's affair: a row group of Parquet or some 10 MB of JSON at a time.
    """

    kind: Literal["dataset"]
    path: str  # a name, or a folder of .jsonl, .parquet, .arrow … files or of save_to_disk
    config: str | None = None  # of a data set that has several, e.g. "20231101.simple"
    split: str = "train"
    revision: str | None = None  # a commit on the Hub, so that the text stays the same
    streaming: bool = True  # false: downloaded whole into the library's cache before it is read

    def inputs(self, cache: Path) -> list[Input]:
        data = self._load()
        names = data.column_names
        if names is not None and self.text_field not in names:
            raise DataError(
                f"source {self.name}: text_field = {self.text_field!r}: no such column in {self.path}; "
                f"columns are {', '.join(names)}; mend text_field"
            )
        count = _shards(data)
        title = f"{self.path}:{self.config}:{self.split}" if self.config else f"{self.path}:{self.split}"
        if count == 1:
            return [Input(title)]
        return [Input(f"{title}-{index:05d}-of-{count:05d}", part=(index, count)) for index in range(count)]

    def records(self, item: Input, cache: Path) -> Iterator[Document | Unreadable]:
        index, count = item.part
        data = self._load()
        shard = data.shard(num_shards=count, index=index, contiguous=True) if count > 1 else data
        row = 0  # rows are counted from 1, as lines are
        rows = iter(shard)
        while (record := self._next(rows, item.name, row)) is not None:
            row += 1
            if (document := self.document(record, f"{item.name}:{row}")) is not None:
                yield document

    def _load(self) -> Any:
        import datasets

        folder = Path(self.path).expanduser()
        try:
            if any((folder / name).is_file() for name in SAVED):
                return self._load_saved(folder)
            path = str(folder) if folder.is_dir() else self.path
            return datasets.load_dataset(
                path, name=self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"source {self.name}: path = {self.path!r}, config = {self.config!r}, split = {self.split!r}: `datasets` cannot "
                f"load it ({_first_line(error)}); mend these, connect to the Hub, or give a local folder"
            ) from None

    def _load_saved(self, folder: Path) -> Any:
        import datasets

        data = datasets.load_from_disk(folder)
        if not isinstance(data, datasets.DatasetDict):
            return data
        if self.split not in data:
            raise DataError(
                f"source {self.name}: split = {self.split!r}: not in {folder}; splits are {', '.join(data)}; mend split"
            )
        return data[self.split]

    def _next(self, rows: Iterator[Mapping[str, Any]], name: str, row: int) -> Mapping[str, Any] | None:
        """The next row, or None. The library raises whatever its reader of a format happens to raise."""
        try:
            return next(rows, None)
        except Exception as error:
            raise DataError(
                f"{name}: `datasets` cannot read on after row {row} ({_first_line(error)}); mend the file or fetch it again"
            ) from None


def _shards(data: Any) -> int:
    """Files of a data set on disk; what `datasets` itself would cut one into that is streamed."""
    import datasets

    if isinstance(data, datasets.Dataset):
        return max(1, min(len(data.cache_files), len(data)))
    return int(data.num_shards)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
