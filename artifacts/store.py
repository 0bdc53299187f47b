"""The store: commits, finds, fetches and names artifacts, in a local folder or at any fsspec URL.

Layout: objects/<digest>/…  records/<key>.json  refs/<name>  leases/<key>…  checkpoints/<key>/…
attachments/<key>/…  attempts/<key>  damaged/<digest>/…  tmp/….
A record is written last, so its presence means that its artifact is complete.
"""

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, Unpack

from artifacts.backend import Backend
from artifacts.errors import DamagedObject, LeaseLost, explained, full_disk_explained
from artifacts.identity import check_digest, check_file_name, check_name, content_digest, describe_files
from artifacts.lease import Lease
from artifacts.local import LocalBackend
from artifacts.patience import wait_out_outages
from artifacts.record import Record, RecordFields, make_record
from artifacts.verification import Damage, Verification, verify_records
from common.errors import UserError, suggestion

__all__ = ["DamagedObject", "LeaseLost", "Store"]

DEFAULT_STORE = "~/.cairn/store"
DEFAULT_CACHE = "~/.cairn/cache"
MIN_PREFIX = 6
COMMIT_TRIES = 3

logger = logging.getLogger("cairn.artifacts")


class Store:
    """Artifacts with their records, names and leases. Opening one touches nothing; it is made at the first write.

    Every method raises UserError, with what to do, where the place is full, forbidden or out of reach.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @classmethod
    def open(cls, url: str | None = None) -> Self:
        """Opens the store at a folder or fsspec URL: by default `CAIRN_STORE`, or else `~/.cairn/store`.

        Raises UserError for a file, and for a protocol that is unknown or whose package is missing.
        """
        url = url or os.environ.get("CAIRN_STORE") or DEFAULT_STORE
        cache = Path(os.environ.get("CAIRN_CACHE") or DEFAULT_CACHE).expanduser().absolute()
        for local in ("file://", "local://"):
            url = url.removeprefix(local)
        if "://" not in url:
            folder = Path(url).expanduser().absolute()
            if folder.exists() and not folder.is_dir():
                raise UserError(f"the store {folder} is a file, not a folder: set CAIRN_STORE to another place")
            return cls(LocalBackend(folder, cache))
        # fsspec's remote side takes longer to import than a local store takes to answer.
        from artifacts.remote import RemoteBackend

        return cls(RemoteBackend.open(url, cache))

    @property
    def url(self) -> str:
        """Where the store is: a folder's absolute path or a URL, fit for `Store.open`."""
        return self.backend.url()

    @property
    def filesystem(self) -> Any:
        """The fsspec filesystem that holds the store."""
        return self.backend.place()[0]

    @property
    def root(self) -> str:
        """The store's path in `filesystem`."""
        return self.backend.place()[1]

    def find(self, key: str) -> Record | None:
        """The complete record of a key whose files are all there in their right sizes, or None.

        A record that is damaged, or whose files are, counts as absent; the log says why.
        """
        record = self.read_record(key)
        if record is None:
            return None
        with explained(self.url):
            present = self.backend.sizes(f"objects/{record.output}")
        for name, entry in record.files.items():
            if present.get(name) != entry.size:
                state = f"has {present[name]} bytes instead of {entry.size}" if name in present else "is missing"
                logger.warning(
                    "the result of stage '%s' (%s) counts as absent: its file %s %s",
                    record.name,
                    key[:8],
                    self.backend.url(f"objects/{record.output}/{name}"),
                    state,
                )
                return None
        return record

    def be_patient(self) -> None:
        """From now on, waits out outages of a store at a URL, as long work wants it that has reached it before."""
        wait_out_outages(self.filesystem)

    def read_record(self, key: str) -> Record | None:
        """A key's record whether or not its files are there; None where it is absent or damaged, which is logged."""
        record, problem = self._read(check_digest(key))
        if problem is not None:
            logger.warning("%s counts as absent: %s", self.backend.url(f"records/{key}.json"), problem)
        return record

    def _read(self, key: str) -> tuple[Record | None, str | None]:
        with explained(self.url):
            data = self.backend.read(f"records/{key}.json")
        if data is None:
            return None, None
        try:
            record = Record.from_json(data)
        except ValueError as error:
            return None, str(error)
        if record.key != key:
            return None, f"it is the record of {record.key}"
        return record, None

    def records(self) -> Iterator[Record]:
        """All whole records in the order of their keys, whether or not their files are there."""
        for key in self._keys():
            record = self.read_record(key)
            if record is not None:
                yield record

    def _keys(self) -> list[str]:
        with explained(self.url):
            names = self.backend.children("records")
        return [name[:-5] for name in names if re.fullmatch(r"[0-9a-f]{64}\.json", name)]

    @contextmanager
    def workspace(self, key: str) -> Iterator[Path]:
        """An empty local folder to make an artifact in, removed after the block.

        It lies inside a local store, so that committing it (or a folder in it) moves the files and copies none.
        Raises UserError where its disk is full, in the block too.
        """
        with ExitStack() as stack:
            with explained(self.url):
                folder = stack.enter_context(self.backend.workspace(check_digest(key)))
            with full_disk_explained(folder):
                yield folder

    def commit(self, folder: Path, *, lease: Lease | None = None, **fields: Unpack[RecordFields]) -> Record:
        """Stores the files of `folder` as the output of `fields["key"]`; returns the key's complete record.

        The first complete record of a key wins and is returned as it is. A folder in a workspace may be gone
        afterwards. Raises LeaseLost, and writes no record, where `lease` is no longer held; UserError for an empty
        folder, for links and for file names that an artifact cannot hold; ValueError for fields that no record has.
        """
        key = check_digest(fields["key"])
        with explained(self.url), self.backend.guard(exclusive=False):
            if lease is not None:
                lease.renew()
            winner = self.find(key)
            if winner is not None:
                return winner
            files = describe_files(folder)
            if not files:
                raise UserError(f"{folder} has no files: stage '{fields['name']}' made nothing that could be kept")
            # Made before any file moves, because a field that cannot be must not cost the output.
            record = make_record(content_digest(files), files, fields)
            self.backend.put_folder(folder, record.output, files)
            if lease is not None:
                lease.renew()
            record = self._publish(record)
            if self.find(key) is None:
                # On an object store a collector may have taken equal old files away, seen there by put_folder.
                self.backend.put_folder(folder, record.output, files)
            return record

    def _publish(self, record: Record) -> Record:
        """Writes a record whose files are in place, unless a complete one came first; returns the one that stands."""
        path = f"records/{record.key}.json"
        if not self.backend.create(path, record.to_json()):
            winner = self.find(record.key)
            if winner is not None:
                return winner
            # What stands there is damaged or has lost its files, and counts as absent.
            self.backend.write(path, record.to_json())
        return record

    def fetch(self, what: Record | str, only: Collection[str] | None = None) -> Path:
        """A local folder, not to be written to, with an artifact's files (or `only` those named).

        `what` is a record or a content digest. Each file is hashed at its first use on this machine; those of a
        remote store come into the cache first. Raises DamagedObject for a file that is missing or damaged, and
        moves a damaged one to `damaged/`, so that the next run makes it anew.
        """
        record = what if isinstance(what, Record) else self._made(check_digest(what))
        wanted = sorted(record.files if only is None else only)
        unknown = [name for name in wanted if name not in record.files]
        if unknown:
            raise UserError(
                f"the output of stage '{record.name}' has no file '{unknown[0]}'" + suggestion(unknown[0], record.files)
            )
        with explained(self.url):
            return self.backend.fetch(record.output, record.files, wanted)

    def _made(self, digest: str) -> Record:
        for record in self.records():
            if record.output == digest:
                return record
        raise UserError(f"no record in {self.url} has the output {digest}: run the recipe that makes it")

    @contextmanager
    def lease(
        self, key: str, wait: Callable[[str], None] | None = None, inputs: Collection[str] = ()
    ) -> Iterator[Lease]:
        """Exclusive work on a key; blocks while somebody else holds it, telling `wait` who that is at each
        look; what `wait` raises ends the waiting.

        `inputs` are the keys of the records that the work reads: they are not collected meanwhile. Raises UserError
        for a store that has neither locks nor conditional writes.
        """
        with ExitStack() as stack:
            with explained(self.url):
                keys = tuple(check_digest(one) for one in inputs)
                lease = stack.enter_context(self.backend.lease(check_digest(key), wait, keys))
            yield lease

    def set_name(self, name: str, key: str) -> None:
        """Points a name at a record, replacing what it pointed at; raises UserError where there is no such record."""
        check_name(name)
        with explained(self.url), self.backend.guard(exclusive=False):
            if self.read_record(key) is None:
                raise UserError(f"cannot name {name}: there is no record {key} in {self.url}")
            for other in self.names():
                if other.startswith(f"{name}/") or name.startswith(f"{other}/"):
                    raise UserError(f"cannot name {name}: '{other}' is a name already, and one cannot hold the other")
            self.backend.write(f"refs/{name}", f"{key}\n".encode())

    def remove_name(self, name: str) -> None:
        """Removes a name and nothing else; raises UserError where there is no such name."""
        names = self.names()
        if name not in names:
            raise UserError(f"no name '{name}' in {self.url}" + suggestion(name, names))
        with explained(self.url):
            self.backend.remove(f"refs/{name}")

    def names(self) -> dict[str, str]:
        """All names and the keys that they point at, sorted; what is no name or no key is logged and left out."""
        found = {}
        with explained(self.url):
            for name in sorted(self.backend.sizes("refs")):
                try:
                    data = self.backend.read(f"refs/{check_name(name)}") or b""
                    found[name] = check_digest(data.decode(errors="replace").strip())
                except UserError as error:
                    logger.warning("%s is ignored: %s", self.backend.url(f"refs/{name}"), error)
        return found

    def resolve(self, ref: str) -> Record:
        """The complete record that a name, or six or more first digits of a key or digest, stand for.

        Raises UserError for one that is unknown or ambiguous, or whose record is not complete.
        """
        names = self.names()
        if ref in names:
            keys = [names[ref]]
        elif re.fullmatch(r"[0-9a-f]{6,64}", ref):
            keys = self._matching(ref)
        else:
            keys = []
        if not keys:
            raise UserError(f"nothing in {self.url} is called '{ref}'" + suggestion(ref, names))
        record = self.find(keys[0])
        if record is None:
            raise UserError(
                f"'{ref}' stands for {keys[0][:8]}, whose record or files are damaged or gone: run it again"
            )
        return record

    def _matching(self, prefix: str) -> list[str]:
        keys = [key for key in self._keys() if key.startswith(prefix)]
        with explained(self.url):
            outputs = [name for name in self.backend.children("objects") if name.startswith(prefix)]
        if len(keys) + len(outputs) > 1:
            raise UserError(f"'{prefix}' is ambiguous{suggestion(prefix, keys + outputs)}")
        return keys or [record.key for record in self.records() if record.output in outputs][:1]

    def attempt(self, key: str) -> int:
        """The number of the start on a worker that the work on a key is at, from 0."""
        with explained(self.url):
            data = self.backend.read(f"attempts/{check_digest(key)}") or b""
        return int(data) if data.isdigit() else 0

    def end_attempt(self, key: str, number: int) -> None:
        """Notes that a start has ended for good, so that the next has another number. Whoever sees the same end may
        say so too."""
        with explained(self.url):
            self.backend.write(f"attempts/{check_digest(key)}", str(number + 1).encode())

    def scratch(self, key: str) -> tuple[Any, str]:
        """The fsspec filesystem and the folder in it where the work on a key keeps what lets it go on."""
        return self.filesystem, f"{self.root}/checkpoints/{check_digest(key)}"

    def local_scratch(self, key: str) -> Path:
        """The same as a folder of this machine, which another machine may not see; it may not be there yet."""
        return self.backend.local_scratch(check_digest(key))

    @contextmanager
    def logs(self, key: str) -> Iterator[Path]:
        """A local folder for what hangs on a record, which outlives a kill; attached to the key after the block."""
        with ExitStack() as stack:
            with explained(self.url):
                folder = stack.enter_context(self.backend.logs(check_digest(key)))
            yield folder

    def attach(self, key: str, path: Path, name: str) -> str:
        """Copies a file to `attachments/<key>/<name>`, for what hangs on a record; returns where it is."""
        target = f"attachments/{check_digest(key)}/{check_file_name(name)}"
        with explained(self.url):
            self.backend.put(path, target)
        return self.backend.url(target)

    def attachments(self, key: str) -> dict[str, str]:
        """What is attached to a key: where each lies, by name."""
        folder = f"attachments/{check_digest(key)}"
        with explained(self.url):
            return {name: self.backend.url(f"{folder}/{name}") for name in sorted(self.backend.sizes(folder))}

    def attachment(self, key: str, name: str) -> bytes:
        """What is attached to a key under a name. Raises UserError where nothing is."""
        path = f"attachments/{check_digest(key)}/{check_file_name(name)}"
        with explained(self.url):
            data = self.backend.read(path)
        if data is None:
            raise UserError(f"nothing is attached to {key[:8]} under the name '{name}' in {self.url}")
        return data

    def verify(self, record: Record | None = None) -> Verification:
        """Hashes all files of one record, or of the whole store with its records and names; says what is wrong.

        Files whose bytes differ are moved to `damaged/`, so that the next run makes them anew.
        """
        damages: list[Damage] = []
        records = [] if record is None else [record]
        for key in self._keys() if record is None else []:
            found, problem = self._read(key)
            if found is not None:
                records.append(found)
            if problem is not None:
                damages.append(Damage(kind="damaged", path=f"records/{key}.json", detail=problem))
        if record is None:
            whole = {one.key for one in records}
            damages += [
                Damage(kind="missing", path=f"records/{key}.json", detail=f"the name '{name}' points at it")
                for name, key in self.names().items()
                if key not in whole
            ]
        with explained(self.url):
            return verify_records(self.backend, records, damages)
