"""The folder of a run in many units: what is planned, what is committed, what is left over.

    run.json             what is run: the resolved job, fingerprint, versions, model, digest of the input
    input.parquet        the prompts as given; a row group is one shard, or several whole ones where they are small
    prompts/ nodes/ ...  uniquely named Parquet files, a folder for each of `TABLES`; those that a commit names count
    _commits/UNIT.json   the unit is done; names its files, their sizes and hashes
    _journal/            deaths.json: how many processes died on which prompt; what is kept of units that are not done;
                         answers/: of a language model, which are never asked for twice
    progress.json        how far it is, rewritten every second or so
    failed.parquet, neurons.parquet, report.html, ...   made when all units are there; plots/, graphs/ as well
    _SUCCESS.json        the run ended; holds the hashes of what was made last, of run.json, and of all commits

The driver is the only writer of everything but table files, so that a worker that was given up can overwrite nothing.
Knows files and their order of writing. Refuses to know models, and what a unit is.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tracer.errors import RunError, first_line, option, quoted
from tracer.store.file import File
from tracer.store.parquet import encoded, opened, rows_of, writer
from tracer.store.record import check_record, damaged_record, is_as_written, signed
from tracer.store.schemas import INPUT, READABLE, SCHEMA_VERSION
from tracer.store.storage import LEASE_FILE, LOCK, Storage

TABLES = ("prompts", "nodes", "edges", "profiles", "values", "means", "candidates", "counts")
PARTS = "revisions"
"""The folder of a run over revisions that holds each one's own run folder."""
SUPERNODES = "supernodes.json"
"""An output that is there to be edited: the end of a run does not vouch for its content."""
OUTPUTS = (
    *("failed.parquet", "neurons.parquet", "edges_mean.parquet", "top_prompts.parquet", "circuit.parquet"),
    *("circuit_nodes.parquet", "circuit_edges.parquet", "exemplars.parquet", "densities.parquet"),
    *("tokens.parquet", "concepts.parquet", SUPERNODES),
    *("steering.parquet", "steering_groups.parquet", "steering.png"),
    *("evaluation.json", "evaluation.csv", "evaluation.png", "quality.json"),
    *("results.json", "curves.csv", "table.csv", "mean.csv", "report.html"),
    *(f"{name}.{kind}" for name in ("comparison", "compared", "courses") for kind in ("parquet", "csv")),
    *("courses.png", "graphs.html"),
)
"""Files that are made of all committed units at the end."""
KEPT = ("descriptions.parquet", "descriptions.json")
"""Files that a user asks for afterwards, of neurons and not of units: they stay when more units come."""
ANSWERS = "_journal/answers"
"""What a language model answered, a file for each request: paid for, so it stays even where another run takes the
folder."""
_ALWAYS = ("failed", "neurons", "top_prompts")
"""Tables that every dataset run has when it ended."""

_GROUP = 1024  # rows of a row group at least, where shards are smaller: every group adds to a footer that all read
_GROUP_BYTES = 2**24  # and at most, of what its shards hold as Arrow, unless one shard alone is more
_TABLE = re.compile(rf"(?P<table>{'|'.join(TABLES)})/(?P<unit>[0-9]+)-[0-9a-f]{{12}}\.parquet", re.ASCII)
_OTHER = re.compile(
    r"_commits/[0-9]+\.json|_journal/(deaths\.json|(circuit_edges|steering)\.safetensors|answers/[0-9a-f]{64}\.json)"
    r"|graphs/(circuit|prompt-[0-9]+)\.html|plots/(claim|(mean\.|[A-Za-z0-9_-]+-)(activation|output))\.png"
    r"|compact/((nodes|edges)/layer_-?[0-9]+\.parquet|compact\.json)"
)
_PART = re.compile(rf"{PARTS}/[A-Za-z0-9._-]+/(.+)", re.ASCII)
_UNIT = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)
_TEMPORARY = re.compile(r"((?:.*/)?)\.([^/]+)\.[0-9a-f]{8}")
_PROBE = ".probe"
_SINGLE = frozenset(("input.parquet", "run.json", "progress.json", "_SUCCESS.json", LOCK, LEASE_FILE, *OUTPUTS, *KEPT))


_Count = Annotated[int, Field(ge=0, le=2**62)]

LEFT_OUT = ("filtered", "skipped")
"""What becomes of prompts that are left out by intent: the model answers otherwise than a filter wants, or it cannot be
asked a built-in pair."""
NOT_FAILED = ("ok", *LEFT_OUT)


class Commit(BaseModel):
    """A unit that is done: its files by table, and what came of its prompts.

    `made_by` says of which job it is a part, so that a lost run.json can be made again; older ones do not say.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    shard: int
    files: dict[str, str] = {}
    rows: dict[str, _Count] = {}
    sizes: dict[str, _Count] = {}
    sha256: dict[str, str] = {}
    statuses: dict[str, _Count] = {}
    errors: dict[str, _Count] = {}
    seconds: float = 0.0
    halved: int = 0
    notes: dict[str, _Count] = {}
    outcome: dict[str, Any] | None = None
    made_by: dict[str, Any] | None = None

    @classmethod
    def of(cls, report: Any) -> Commit:
        """The commit that a worker's report becomes."""
        outcome = report.model_dump(include={"statuses", "errors", "seconds", "halved", "notes", "outcome"})
        return cls.naming(report.unit, report.files, **outcome)

    @classmethod
    def naming(cls, shard: int, files: Mapping[str, File], **outcome: Any) -> Commit:
        """The commit of a unit that left these files, by table."""
        return cls(
            shard=shard,
            files={name: file.name for name, file in files.items()},
            rows={name: file.rows for name, file in files.items()},
            sizes={name: file.size for name, file in files.items()},
            sha256={name: file.sha256 for name, file in files.items()},
            **outcome,
        )

    @model_validator(mode="after")
    def _agrees(self) -> Commit:
        """Files are named as `write_shard` names them. Rows, sizes and hashes are of those; version 2 kept no sizes and
        hashes of a single prompt's."""
        for table, name in self.files.items():
            found = _TABLE.fullmatch(name)
            if found is None or (found["table"], int(found["unit"])) != (table, self.shard):
                raise ValueError(f"{name[:100]!r} is not the name of its table's file")
        if self.rows.keys() != self.files.keys() or {*self.sizes, *self.sha256} - self.files.keys():
            raise ValueError("rows, sizes or hashes are not of the files it names")
        return self

    @property
    def n_prompts(self) -> int:
        """Prompts of the unit, whatever became of them."""
        return sum(self.statuses.values())

    @property
    def n_failed(self) -> int:
        """Prompts of the unit that have no result and should have one."""
        return self.n_prompts - sum(self.statuses.get(name, 0) for name in NOT_FAILED)


class _Plan(NamedTuple):
    """Where the shards of input.parquet are: its footer, prompts of a shard, and where its row groups begin and end."""

    metadata: Any
    shard_size: int
    starts: list[int]


class RunFolder:
    """One run's folder, for its driver, its workers and its readers."""

    def __init__(self, address: Any) -> None:
        self.place = Storage(address)
        self._planned: _Plan | None = None

    def part(self, name: str) -> str:
        """The address of one of the run folders of a run over revisions."""
        base, mark, query = self.place.address.partition("?")
        return f"{base.rstrip('/')}/{PARTS}/{name}{mark}{query}"

    # ------------------------------------------------------------------------------------- the record

    def record(self, resume: bool = False) -> dict[str, Any] | None:
        """What run.json holds; None where there is none.

        Args:
            resume: the run is to be resumed, which the one before today's version cannot.

        Raises:
            RunError: damaged, or another version's.
        """
        if not self.place.exists("run.json"):
            return None
        try:
            record = self.place.read_json("run.json")
        except RunError as error:
            raise damaged_record(error.rule) from error
        version = record.get("schema_version")
        if not isinstance(version, str):
            raise damaged_record("it does not say of which schema version it is")
        if version not in ({SCHEMA_VERSION} if resume else READABLE):
            raise RunError(
                f"run {quoted(str(self.place), 300)}",
                f"has schema version {quoted(version)}, this tracer reads {SCHEMA_VERSION!r}",
                "read it with the version that wrote it, or run it again elsewhere",
            )
        if not is_as_written(record):
            kind = record.get("kind")
            raise damaged_record("it has other content than was written", kind if isinstance(kind, str) else None)
        check_record(record)
        sealed: dict[str, Any] = {}
        with suppress(RunError):  # a mark that is damaged is made again
            sealed = self._sealed().get("files", {})
        growing = "extended_from" in record  # from here on it is not what it was when it ended
        if "run.json" in sealed and not growing and self._content_problem("run.json", sealed["run.json"]):
            raise damaged_record("it is not that of the run that ended here", record["kind"])
        return record

    def begin(self, record: Mapping[str, Any]) -> None:
        """Write run.json: from now on this is the run of that job."""
        self.place.write_json("run.json", signed({"schema_version": SCHEMA_VERSION, **record}))

    def is_empty(self) -> bool:
        """Whether nothing is here but what a driver leaves behind that ends before its run is planned."""
        if self.place.exists("run.json") or self._has_done():
            return False
        return all(is_ours(name) or name.startswith(".") for name, _ in self.place.files(recursive=True))

    def _has_done(self) -> bool:
        """Whether a commit is here, or in a part."""
        if any(_OTHER.fullmatch(name) for name, _ in self.place.files("_commits")):
            return True
        inside = (_PART.fullmatch(name) for name, _ in self.place.files(PARTS, recursive=True))
        return any(one is not None and one[1].startswith("_commits/") and is_ours(one[1]) for one in inside)

    def check(self, repair: bool = False) -> None:
        """Refuse, before anything is computed, a folder that holds something else or cannot be written.

        Args:
            repair: the folder may be that of a run without its run.json.

        Raises:
            RunError: that.
            OSError: it cannot be written.
        """
        local = self.place.local
        if local is not None and local.exists() and not local.is_dir():
            raise RunError(f"path {quoted(str(local), 300)}", "is a file, not a folder", "choose another")
        if not self.place.exists("run.json") and not self.is_empty():
            lost = self._has_done()
            if not (lost and repair):
                rule = "holds files that are not a run"
                step = f"choose another, or give {option('repair', True)}, which makes a lost run.json again"
                raise RunError(f"folder {quoted(str(self.place), 300)}", rule, step if lost else "choose another")
        if local is not None:
            local.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=local).close()
        else:
            self.place.write(_PROBE, b"x")
            self.place.remove(_PROBE)

    def clear(self, keep: Iterable[str] = ()) -> None:
        """Remove a run: everything of ours, its parts' too, and nothing else. While there is a commit there is its
        run.json.

        Args:
            keep: table files of the run that takes its place.
        """
        for name in sorted({file.name.split("/")[1] for file in self.place.files(PARTS, recursive=True)}):
            RunFolder(self.part(name)).clear()
        self.delete_outputs()
        for file in self.place.files("_commits"):
            if is_ours(file.name):
                self.place.remove(file.name)
        for name in ("run.json", "_journal/deaths.json", "input.parquet", "progress.json", *KEPT):
            self.place.remove(name)
        self.sweep(keep)

    # -------------------------------------------------------------------------------------- the input

    def write_input(self, rows: Iterable[Mapping[str, Any]], shard_size: int, known: int = 0) -> int:
        """Write the prompts and return how many there are; memory is that of a few shards.

        Args:
            known: of the prompts that are planned already so many must come again, in the same shards; the plan stays
                as it is where they do not.

        Raises:
            RunError: they do not.
        """
        count, part, group, size = 0, list[Mapping[str, Any]](), list[pa.Table](), 0

        def flush() -> None:
            table = pa.concat_tables(group).combine_chunks()
            parquet.write_table(table, row_group_size=table.num_rows)
            group.clear()

        with self.place.writing("input.parquet") as file, writer(file, INPUT) as parquet:
            parquet.add_key_value_metadata({"shard_size": str(shard_size)})
            for row in rows:
                part.append({**row, "prompt_id": count})
                count += 1
                if len(part) < shard_size:
                    continue
                group.append(self._again(part, count - len(part), known))
                size += group[-1].nbytes
                part.clear()
                if len(group) * shard_size >= _GROUP or size >= _GROUP_BYTES:
                    flush()
                    size = 0
            if part:
                group.append(self._again(part, count - len(part), known))
            if group:
                flush()
            if count < known:
                raise self._not_again(f"has {known:,} prompts, the job only {count:,}")
        self._planned = None
        return count

    def _again(self, part: Sequence[Mapping[str, Any]], first: int, known: int) -> pa.Table:
        """A shard's prompts as a table, the `known` ones of which are as they were planned."""
        table = pa.Table.from_pylist(list(part), INPUT)
        old = max(0, min(known - first, len(part)))
        if old and not self._shard(first // self._plan().shard_size).slice(0, old).equals(table.slice(0, old)):
            raise self._not_again(f"has other prompts than the job among its first {first + old:,}")
        return table

    def _not_again(self, rule: str) -> RunError:
        step = f"choose another, or give {option('overwrite', True)}"
        return RunError(f"folder {quoted(str(self.place), 300)}", rule, step)

    def read_input(self, shard: int) -> list[dict[str, Any]]:
        """The prompts of one shard.

        Raises:
            RunError: the plan is missing or damaged, or has no such shard.
        """
        return self._shard(shard).to_pylist()

    def _shard(self, shard: int) -> pa.Table:
        plan = self._plan()
        first = shard * plan.shard_size
        if not 0 <= first < plan.starts[-1]:
            raise _damaged_plan()
        group = bisect.bisect_right(plan.starts, first) - 1
        try:
            with self.place.fs.open_input_file(self.place.path("input.parquet")) as file:
                rows = rows_of(opened(file, metadata=plan.metadata), groups=[group])
        except (OSError, pa.ArrowException) as error:
            raise _damaged_plan() from error
        for name in INPUT.names[len(rows.column_names) :]:  # columns that older folders do not have
            rows = rows.append_column(INPUT.field(name), pa.nulls(rows.num_rows, INPUT.field(name).type))
        return rows.slice(first - plan.starts[group], plan.shard_size).combine_chunks()

    def shard_size(self) -> int:
        """Prompts of a shard, as planned.

        Raises:
            RunError: the plan is missing or damaged.
        """
        return self._plan().shard_size

    def count_input(self) -> tuple[int, int]:
        """Prompts and shards that are planned.

        Raises:
            RunError: the plan is missing or damaged.
        """
        plan = self._plan()
        return plan.starts[-1], -(-plan.starts[-1] // plan.shard_size)

    def digest_input(self) -> str:
        """SHA-256 of the plan, in hexadecimal digits.

        Raises:
            RunError: it is missing or damaged.
        """
        try:
            with self.place.fs.open_input_stream(self.place.path("input.parquet")) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
        except OSError as error:
            raise _damaged_plan() from error

    def _plan(self) -> _Plan:
        """The footer of input.parquet, read once."""
        if self._planned is None:
            try:
                with self.place.fs.open_input_file(self.place.path("input.parquet")) as file:
                    found = pq.read_metadata(file)
                size = int((found.metadata or {})[b"shard_size"])
            except (OSError, pa.ArrowException, KeyError, ValueError) as error:
                raise _damaged_plan() from error
            if size < 1:
                raise _damaged_plan()
            rows = (found.row_group(i).num_rows for i in range(found.num_row_groups))
            self._planned = _Plan(found, size, [0, *itertools.accumulate(rows)])
        return self._planned

    # ------------------------------------------------------------------------------- what workers write

    def write_shard(self, table: str, unit: int, content: pa.Table, schema: pa.Schema) -> File:
        """Write one table of one unit under a name of its own; it counts when a commit names it."""
        data = encoded(content.cast(schema))
        name = f"{table}/{unit}-{uuid.uuid4().hex[:12]}.parquet"
        self.place.write(name, data)
        return File(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=content.num_rows)

    def read_table(self, name: str, columns: list[str] | None = None, sha256: str | None = None) -> pa.Table:
        """A table file, or some of its columns, under today's names.

        Args:
            sha256: of the file as it was committed.

        Raises:
            RunError: it is missing or damaged.
        """
        try:
            content = self.place.read(name) if sha256 is not None else None
            if content is not None and hashlib.sha256(content).hexdigest() != sha256:
                raise _damaged(name, "has other content than was committed")
            source, fs = (pa.BufferReader(content), None) if content else (self.place.path(name), self.place.fs)
            with opened(source, fs) as file:
                return rows_of(file, columns)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise _damaged(name, "is missing or damaged") from error

    def read_committed(self, commit: Commit, table: str, columns: list[str] | None = None) -> pa.Table:
        """A unit's table, or some of its columns, under today's names; checked to be as it was committed.

        Raises:
            RunError: it is missing or damaged.
        """
        return self.read_table(commit.files[table], columns, commit.sha256.get(table))

    def read_output(self, name: str) -> pa.Table:
        """A table of the whole run, under today's names; checked to be as it was when the run ended.

        Raises:
            RunError: it is missing or damaged.
        """
        return self.read_table(name, sha256=self._sealed().get("files", {}).get(name))

    def find_output(self, name: str) -> pa.Table | None:
        """The same of a table that the run need not have; None where it has none.

        Raises:
            RunError: it is damaged.
        """
        return self.read_output(name) if self.place.exists(name) else None

    # ------------------------------------------------------------------------------- what the driver writes

    def commit(self, commit: Commit) -> None:
        """Mark a unit as done; the files it names were written before."""
        content = signed(commit.model_dump(mode="json", exclude_defaults=True) | {"shard": commit.shard})
        # An outcome may hold NaN.
        self.place.write(f"_commits/{commit.shard}.json", json.dumps(content, indent=1, sort_keys=True).encode())

    def tables(self, wanted: Collection[str], contents: bool = True) -> tuple[dict[str, list[str]], list[str]]:
        """Tables of the run and their files, as full paths for Arrow and DuckDB; only what is committed and there.

        Args:
            wanted: names of tables.
            contents: compare the content of each file with its hash; else only its size.

        Returns:
            The files by table, and what a reader must know that is not among them: a sentence each.

        Raises:
            RunError: no run there, or a file or a record is damaged.
        """
        if (record := self.record()) is None:
            value = f"folder {quoted(str(self.place), 300)}"
            raise RunError(value, "holds no run (no run.json)", "give the folder of a run")
        if record.get("kind") == "benchmark":
            value = f"run {quoted(str(self.place), 300)}"
            raise RunError(value, "is a benchmark, which has no tables of prompts", "read its curves.csv and table.csv")
        tables: dict[str, list[str]] = {}
        gaps, units, done = list[str](), 0, 0
        for commit in self.commits():
            units, done = units + 1, done + commit.n_prompts
            for name in commit.files.keys() & set(wanted):
                if self.place.size(commit.files[name]) is None:
                    gaps.append(f"{commit.files[name]} is missing")
                    continue
                # Version 2 kept no sizes and hashes of a single prompt's files.
                for problem in self.problems(commit, contents, only=name) if commit.sizes else ():
                    raise RunError(f"run {quoted(str(self.place), 300)}", problem, "repeat the run command")
                tables.setdefault(name, []).append(self.place.path(commit.files[name]))
        sealed = self._sealed()
        if problems := self.check_outputs([f"{name}.parquet" for name in wanted] if contents else ()):
            raise RunError(f"run {quoted(str(self.place), 300)}", problems[0], "repeat the run command")
        if units < (planned := record.get("n_units", 1)):
            count = f"{done:,} of {record.get('n_prompts', 0):,} prompts"
            gaps.insert(0, f"the run is unfinished: {count if record.get('kind') == 'dataset' else units} are there")
        for name in sorted({*wanted} - {*TABLES}):
            if self.place.exists(f"{name}.parquet"):
                tables[name] = [self.place.path(f"{name}.parquet")]
            elif f"{name}.parquet" in sealed.get("files", {}):
                gaps.append(f"{name}.parquet is missing")
            elif record.get("kind") == "dataset" and not sealed and name in _ALWAYS:
                gaps.append(f"the table {name} is made when a run ends" + (f", after {planned:,} shards"))
        return tables, gaps

    def commits(self, damaged: list[int] | None = None) -> Iterator[Commit]:
        """Every unit that is done, in order; read as they are asked for.

        Args:
            damaged: takes the units whose commits cannot be read, which are then left out.

        Raises:
            RunError: a commit is damaged, and nothing takes it.
        """
        for unit, name in self._commit_names():
            try:
                commit = self._commit(unit, name)
            except RunError:
                if damaged is None:
                    raise
                damaged.append(unit)
            else:
                yield commit

    def _commit_names(self) -> list[tuple[int, str]]:
        """Units that are done, in order, and the files that say so."""
        for name in self.place.folders("_commits"):
            if _UNIT.fullmatch(_stem(name)):
                value = f"path {quoted(f'{self.place}/_commits/{name}', 300)}"
                raise RunError(value, "is a folder, not a file", "move it away and repeat the run command")
        names = ((_stem(name), name) for name, _ in self.place.files("_commits"))
        return sorted((int(stem), name) for stem, name in names if _UNIT.fullmatch(stem))

    def has_commits(self) -> bool:
        """Whether anything is done."""
        return bool(self.place.files("_commits"))

    def find(self, unit: int) -> Commit | None:
        """The commit of one unit; None if it is not done."""
        name = f"_commits/{unit}.json"
        return self._commit(unit, name) if self.place.exists(name) else None

    def _commit(self, unit: int, name: str) -> Commit:
        step = "delete it and repeat the command"
        try:
            content = self.place.read_json(name)
            if not is_as_written(content):
                raise RunError(f"commit {quoted(name)}", "is damaged: it has other content than was written", step)
            commit = Commit.model_validate(content)
        except ValidationError as error:
            rule = "is damaged: it does not name the files of its unit"
            raise RunError(f"commit {quoted(name)}", rule, step) from error
        except RunError as error:
            raise RunError(f"commit {quoted(name)}", error.rule, step) from error
        if commit.shard != unit:
            raise RunError(f"commit {quoted(name)}", f"is damaged: it is that of unit {commit.shard}", step)
        return commit

    def uncommit(self, unit: int) -> None:
        """Take a commit back: its unit is to be done again."""
        self.place.remove(f"_commits/{unit}.json")

    def problems(self, commit: Commit, contents: bool = True, only: str | None = None) -> list[str]:
        """What is wrong with a commit's files, or the one of a table: missing, of another size, or of other content (if
        that is read)."""
        problems = []
        for table, name in commit.files.items():
            if only not in (None, table):
                continue
            size = self.place.size(name)
            if size is None:
                problems.append(f"{name} is missing")
            elif size != commit.sizes.get(table):
                problems.append(f"{name} has {size} bytes, its commit says {commit.sizes.get(table)}")
            elif contents and (problem := self._content_problem(name, commit.sha256.get(table))):
                problems.append(f"{name} {problem}")
        return problems

    def _content_problem(self, name: str, wanted: str | None, when: str = "was committed") -> str | None:
        try:
            actual = hashlib.sha256(self.place.read(name)).hexdigest()
        except OSError as error:
            return f"cannot be read ({first_line(error.strerror or error)})"
        return None if actual == wanted else f"has other content than {when}"

    def seal(self, **told: Any) -> None:
        """Mark that the run ended, with the hashes of what no commit names."""
        there = [name for name in ("run.json", *OUTPUTS, *KEPT) if name != SUPERNODES and self.place.exists(name)]
        there += sorted(name for name, _ in self.place.files("graphs") if _is_graph(name))
        files = {name: hashlib.sha256(self.place.read(name)).hexdigest() for name in there}
        self.place.write_json("_SUCCESS.json", {**told, "files": files, "commits": self._digest_commits()})

    def reseal(self, names: Iterable[str]) -> None:
        """Take these outputs of a run that ended as they are now, and forget graph pages that are gone; nothing is done
        where it has not ended."""
        if not (sealed := self._sealed()):
            return
        kept = {name: then for name, then in sealed["files"].items() if not _is_graph(name) or self.place.exists(name)}
        made = {name: hashlib.sha256(self.place.read(name)).hexdigest() for name in names}
        self.place.write_json("_SUCCESS.json", sealed | {"files": kept | made})

    def _sealed(self) -> dict[str, Any]:
        """What `seal` wrote; nothing while a run goes on.

        Raises:
            RunError: it is damaged.
        """
        found = self.place.read_json("_SUCCESS.json") if self.place.exists("_SUCCESS.json") else {}
        files = found.get("files", {})
        if not isinstance(files, dict) or not all(is_ours(name) for name in files):
            raise _damaged("_SUCCESS.json", "is damaged")
        return found

    def _digest_commits(self) -> str:
        """SHA-256 of all commits in the order of their units."""
        digest = hashlib.sha256()
        for _, name in self._commit_names():
            digest.update(self.place.read(name))
        return digest.hexdigest()

    def check_outputs(self, among: Collection[str] | None = None) -> list[str]:
        """What is wrong with the records and outputs of a run that ended: missing, or of other content than then.

        Args:
            among: of the outputs only these.
        """
        try:
            sealed = self._sealed()
        except RunError:
            return ["_SUCCESS.json is damaged"]
        problems = []
        for name, then in sealed.get("files", {}).items():
            if among is not None and name not in ("run.json", *among):
                continue
            if not self.place.exists(name):
                problems += [] if among is not None else [f"{name} is missing"]
            elif problem := self._content_problem(name, then, "when the run ended"):
                problems.append(f"{name} {problem}")
        if sealed.get("commits", None) not in (None, self._digest_commits()):
            problems.append("_commits has other content than when the run ended")
        return problems

    def sweep(self, named: Iterable[str]) -> int:
        """Remove table files that no commit names, and what interrupted writes left; how many there were."""
        keep, removed = set(named), 0
        for folder in ("", "_commits", "_journal", ANSWERS, *TABLES):
            for name, _ in self.place.files(folder):
                orphan = folder in TABLES and name not in keep and _TABLE.fullmatch(name)
                if orphan or ((half := _TEMPORARY.fullmatch(name)) and is_ours(half[1] + half[2])):
                    self.place.remove(name)
                    removed += 1
        return removed

    def delete_outputs(self) -> None:
        """Delete the outputs and the mark that the run ended: more units are to come."""
        for name in ("_SUCCESS.json", *OUTPUTS):
            self.place.remove(name)
        made = (*self.place.files("plots"), *self.place.files("graphs"), *self.place.files("compact", recursive=True))
        for name, _ in made:
            if is_ours(name):
                self.place.remove(name)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table of the whole run."""
        self.place.write(name, encoded(table))


def is_ours(name: str) -> bool:
    """Whether a run writes a file of this name, or an interrupted write leaves one."""
    half = _TEMPORARY.fullmatch(name)
    name = half[1] + half[2] if half else name
    if part := _PART.fullmatch(name):
        return is_ours(part[1])
    return name in _SINGLE or any(kind.fullmatch(name) for kind in (_TABLE, _OTHER))


def _is_graph(name: str) -> bool:
    return name.startswith("graphs/") and _OTHER.fullmatch(name) is not None


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".json")


def _damaged(name: str, rule: str) -> RunError:
    return RunError(f"file {quoted(name)}", rule, "repeat the run command")


def _damaged_plan() -> RunError:
    step = f"repeat the run command with {option('repair', True)}, which makes it again from the job"
    return RunError("file 'input.parquet'", "is missing or damaged", step)
