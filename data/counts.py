"""How much text: what every account of a preparation adds up."""

from data.manifest import Record


class Count(Record):
    """Some documents and the UTF-8 bytes of their texts."""

    documents: int = 0
    bytes: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(documents=self.documents + other.documents, bytes=self.bytes + other.bytes)

    def __sub__(self, other: "Count") -> "Count":
        return Count(documents=self.documents - other.documents, bytes=self.bytes - other.bytes)
