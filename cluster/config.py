"""The one typed configuration of a cluster: defaults < TOML file < `TITANMEM_*` variables < flags."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from actors.options import DURABILITIES
from storage.names import BUCKETS, check_name
from titanmem.decoder_config import SERVED, UNUSED
from titanmem.spec import RANGES

ENV_PREFIX = "TITANMEM_"
SPEC_PREFIX = "spec_"
DEFAULT_KEEPER = "actors.keeper:open_keeper"
DEFAULT_MODEL_NAME = "titanmem-small"
STORE_SCHEMES = ("file", "s3", "redis", "rediss")
SHARDS_MAX = 1024
SLOTS_MAX = 65536

assert SHARDS_MAX <= BUCKETS, "a shard without a bucket would serve nobody"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All that `titanmem serve` and `cluster.app:build` can be told. Raises `ValueError` naming the field."""

    host: str = "127.0.0.1"
    """Address that the HTTP door binds. Anything but a loopback address needs `api_keys`."""
    port: int = 8000
    """TCP port of the HTTP door, 1 to 65535."""
    shards: int = 1
    """Shard actors, 1 to 1024: each the single writer of its users, and on a GPU of its own if there are."""
    mode: str = "mac"
    """How memory meets attention, one of `titanmem.decoder_config.SERVED`."""
    rule: str = "sparse"
    """Update rule of the memory, one of `titanmem.decoder_config.SERVED`."""
    model: str | None = None
    """Folder with θ_F (`config.json`, weights, tokenizer); None is the small model that is shipped."""
    store: str = "file://./var/store"
    """`file://`, `s3://` or `redis://` URL where memories and the shard map rest; a relative path is made absolute."""
    journal_dir: str = "./var/journal"
    """Local folder of the shards' journals: acknowledged tokens that no stored memory holds yet."""
    snapshots: str = "file://./var/snapshots"
    """`file://` or `s3://` URL where cold backups go."""
    snapshot_interval_s: float = 86_400.0
    """Seconds between two cold backups, 60 to 31,536,000; 0 makes them on demand only."""
    slots: int = 64
    """Users resident at once in one shard, 1 to 65536; the least recently used is stored and makes room."""
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Tenant -> bearer key. Empty: one tenant `local`, no keys, loopback only."""
    admin_key: str | None = field(default=None, repr=False)
    """Bearer key of the `/admin` routes; None opens them on a loopback address without `api_keys` alone."""
    body_bytes_max: int = 4_194_304
    """Largest JSON body in bytes, 1,024 to 268,435,456; ingest is streamed and has no such limit."""
    queue_max: int = 256
    """Requests that may wait in one shard, 1 to 65536; more are answered 429."""
    request_timeout_s: float = 600.0
    """Longest time that one request may take, 1 to 86,400 seconds, retries in it."""
    ray_address: str | None = None
    """Address of a running Ray cluster to join; None starts Ray on this machine."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector (OTLP over HTTP), such as `http://127.0.0.1:4318`; None sends no traces."""
    ingress_replicas: int = 1
    """Stateless HTTP replicas, 1 to 64."""
    durability: str = "local"
    """What an answer waits for: local = its tokens are in the journal on the shard's disk; replicated = the same, and
    they are in the store at most `replicate_interval_s` later; sync = they are in the store."""
    replicate_interval_s: float = 2.0
    """With `durability` replicated: seconds after which the store has what was acknowledged, 0.1 to 3,600. It is
    what the loss of a node with its disk may cost."""
    sync_timeout_s: float = 10.0
    """With `durability` sync: seconds that an answer waits for the store before it ends with 503 `not_replicated`, 0.1
    to 3,600; less than `request_timeout_s`, which would end it without saying why."""
    unconfirmed_s: float = 60.0
    """With `durability` replicated: seconds that answers go out while the store cannot be asked whose shard this is,
    0 to 3,600. It bounds what a shard acknowledges in vain that another has replaced meanwhile."""
    persist_tokens: int = 4096
    """Tokens of a user between two stored versions, 256 to 65536."""
    idle_flush_s: float = 30.0
    """Seconds without a request after which a user's memory is stored, 0.1 to 86,400."""
    consolidate_after_s: float = 20.0
    """Seconds without a request after which what a user's memory has written is consolidated, 0.1 to 86,400; 0 is
    never. Shorter than `idle_flush_s`, so that one stored version holds both."""
    spares: int = 1
    """Processes on each node that stand ready to become a shard whose process has died, 0 to 8; each takes the memory
    of a process without users, and 0 makes a failover some seconds longer."""
    seed: int = 0
    """Seed of sampling where a request brings none, 0 to 2**63 - 1."""
    spec: Mapping[str, object] = field(default_factory=dict)
    """Knobs of `MemorySpec` that win over the checkpoint's: `[spec]` in TOML, `TITANMEM_SPEC_<KNOB>`."""
    keeper: str = DEFAULT_KEEPER
    """`module:function` that opens a shard's keeper; tests put their own here."""

    def __post_init__(self) -> None:
        for name in ("store", "snapshots"):
            object.__setattr__(self, name, _absolute_url(name, getattr(self, name)))
        object.__setattr__(self, "journal_dir", str(Path(self.journal_dir).expanduser().absolute()))
        object.__setattr__(self, "api_keys", _check_keys(self.api_keys))
        object.__setattr__(self, "spec", checked_spec(self.spec))
        for name, low, high in _RANGES:
            _check_range(name, getattr(self, name), low, high)
        _check_range("snapshot_interval_s", self.snapshot_interval_s or 60, 60, 31_536_000)
        _check_range("consolidate_after_s", self.consolidate_after_s or 0.1, 0.1, 86_400)
        for name, allowed in (*SERVED.items(), ("durability", DURABILITIES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
        for name in ("host", "keeper"):
            if not getattr(self, name):
                raise ValueError(f"{name}: must not be empty")
        if self.keeper.count(":") != 1:
            raise ValueError(f"keeper: {self.keeper!r} is not of the form module:function")
        if self.admin_key is not None and not self.admin_key:
            raise ValueError("admin_key: must not be empty; leave it out to have none")
        if self.durability == "sync" and self.sync_timeout_s >= self.request_timeout_s:
            raise ValueError(
                f"sync_timeout_s: {self.sync_timeout_s:g} is not less than request_timeout_s, "
                f"{self.request_timeout_s:g}"
            )
        if not self.loopback and not self.api_keys:
            raise ValueError(
                f"host: {self.host} can be reached from outside, so api_keys must not be empty "
                f"(set {ENV_PREFIX}API_KEYS=tenant=key, or bind 127.0.0.1)"
            )

    @property
    def loopback(self) -> bool:
        """True if only this machine can reach the door."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def model_folder(self) -> Path:
        """Absolute folder of the model that is served."""
        if self.model is not None:
            return Path(self.model).expanduser().absolute()
        return Path(__file__).resolve().parent.parent / "titanmem" / "default_model"

    @property
    def model_name(self) -> str:
        """What clients call the model: its folder's name."""
        return DEFAULT_MODEL_NAME if self.model is None else self.model_folder.name

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, secrets included; `from_mapping` reads it back."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {"api_keys": dict(self.api_keys), "spec": dict(self.spec)}


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("port", 1, 65535),
    ("shards", 1, SHARDS_MAX),
    ("slots", 1, SLOTS_MAX),
    ("body_bytes_max", 1024, 268_435_456),
    ("queue_max", 1, 65536),
    ("request_timeout_s", 1, 86_400),
    ("ingress_replicas", 1, 64),
    ("persist_tokens", 256, 65536),
    ("idle_flush_s", 0.1, 86_400),
    ("spares", 0, 8),
    ("replicate_interval_s", 0.1, 3_600),
    ("sync_timeout_s", 0.1, 3_600),
    ("unconfirmed_s", 0, 3_600),
    ("seed", 0, 2**63 - 1),
)
_FIELDS = {f.name: f for f in dataclasses.fields(Config)}
_INTEGERS = {name for name, f in _FIELDS.items() if f.type == "int"}
_NUMBERS = {name for name, f in _FIELDS.items() if f.type == "float"}
_TABLES = ("api_keys", "spec")


def laptop(**overrides: Any) -> Config:
    """The embedded default: one CPU shard, files under `./var`, loopback only."""
    return Config(**overrides)


def one_h100(**overrides: Any) -> Config:
    """One H100 with 80 GB: thousands of resident users, more doors, longer queues."""
    settings: dict[str, Any] = {"slots": 4096, "queue_max": 4096, "ingress_replicas": 4} | overrides
    return Config(**settings)


def from_mapping(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """`base` (default: `laptop()`) with `values` over it; text is read as the field's type.

    Raises `ValueError` that names the field.
    """
    return _layered(base or laptop(), [("", values)])


def load(
    file: Path | str | None = None,
    *,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    base: Config | None = None,
) -> Config:
    """The configuration of this start: `base` < TOML `file` < `env` < `flags`; a flag of None was not given.

    Raises `ValueError` that names the source (file or environment) and the field.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None:
        layers.append((f"{file}: ", _read_toml(Path(file))))
    layers.append(("from the environment: ", _from_env(os.environ if env is None else env)))
    layers.append(("", {k: v for k, v in (flags or {}).items() if v is not None}))
    return _layered(base or laptop(), layers)


def _layered(base: Config, layers: list[tuple[str, Mapping[str, Any]]]) -> Config:
    """Later layers win, and only the whole is checked: the host may stand in a file, its keys in variables."""
    plain = base.to_dict()
    sources: dict[str, str] = {}
    for source, values in layers:
        for name, value in values.items():
            if name not in _FIELDS:
                raise ValueError(f"{source}{name}: no such field; there are {', '.join(sorted(_FIELDS))}")
            try:
                value = _typed(name, value)
            except ValueError as error:
                raise ValueError(f"{source}{error}") from None
            plain[name] = {**plain[name], **value} if name == "spec" else value
            sources[name] = source
    try:
        return Config(**plain)
    except ValueError as error:
        field_name = str(error).partition(":")[0]
        raise ValueError(f"{sources.get(field_name, '')}{error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    spec: dict[str, object] = {}
    for variable, text in env.items():
        if not variable.startswith(ENV_PREFIX) or not text:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name.startswith(SPEC_PREFIX):
            spec[name.removeprefix(SPEC_PREFIX)] = text
        elif name in _FIELDS:
            values[name] = text
    return values | ({"spec": spec} if spec else {})


def _typed(name: str, value: Any) -> Any:
    """`value` as the field's type; text (from the environment or a flag) is parsed."""
    if name in _TABLES:
        return _table(name, value)
    if name in _INTEGERS or name in _NUMBERS:
        kind = int if name in _INTEGERS else float
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"{name}: {value!r} is not a number")
        try:
            number = kind(value)
        except ValueError:
            raise ValueError(f"{name}: {value!r} is not {_a_number(name)}") from None
        if kind is int and not isinstance(value, str) and number != value:
            raise ValueError(f"{name}: {value!r} is not {_a_number(name)}")
        return number
    if value is None and str(_FIELDS[name].type).endswith("| None"):
        return None
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{name}: {value!r} is not text")
    return value


def _table(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        pairs = [item.partition("=") for item in value.split(",") if item.strip()]
        if not all(middle for _, middle, _ in pairs):
            raise ValueError(f"{name}: expected name=value, separated by commas")
        return {left.strip(): right.strip() for left, _, right in pairs}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected a table of names and values, not {type(value).__name__}")
    return dict(value)


def _a_number(name: str) -> str:
    return "a whole number" if name in _INTEGERS else "a number"


def _check_range(name: str, value: float, low: float, high: float) -> None:
    kind = int if name in _INTEGERS else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
        raise ValueError(f"{name}: {value!r} is not {_a_number(name)}")
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is outside {low} to {high}")


def _check_keys(keys: Mapping[str, str]) -> dict[str, str]:
    """Messages name the tenant, never the key."""
    for tenant, key in keys.items():
        try:
            check_name("tenant", tenant)
        except ValueError as error:
            raise ValueError(f"api_keys: {error}") from None
        if not isinstance(key, str) or not 8 <= len(key) <= 512 or not key.isprintable() or " " in key:
            raise ValueError(f"api_keys: the key of tenant {tenant} needs 8 to 512 characters without spaces")
    if len(set(keys.values())) != len(keys):
        raise ValueError("api_keys: two tenants have the same key")
    return dict(keys)


def checked_spec(spec: Mapping[str, object]) -> dict[str, object]:
    """Names and single ranges; how knobs go together is checked with the checkpoint's own, at its loading."""
    plain: dict[str, object] = {}
    for knob, value in spec.items():
        if knob not in RANGES or knob in UNUSED:
            known = ", ".join(sorted(RANGES.keys() - UNUSED))
            raise ValueError(
                f"spec: {knob}: {f'set {knob} itself' if knob in SERVED else f'the knobs are {known}'}"
            )
        number = _number_if_one(value) if isinstance(value, str) else value
        low, high = RANGES[knob]
        if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
            raise ValueError(f"spec: {knob}: {value!r} is not a number from {low} to {high}")
        plain[knob] = number
    return plain


def _number_if_one(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _absolute_url(name: str, url: str) -> str:
    """`file://./x` (or a bare path) as `file:///absolute/x`; other known schemes as they are."""
    if not isinstance(url, str) or not url:
        raise ValueError(f"{name}: expected a URL such as file:///path or s3://bucket/prefix")
    if "://" not in url:
        url = f"file://{url}"
    scheme = urlsplit(url).scheme
    if scheme not in STORE_SCHEMES:
        schemes = ", ".join(f"{known}://" for known in STORE_SCHEMES)
        raise ValueError(f"{name}: no store for {scheme}://; there are {schemes}")
    if scheme != "file":
        return url
    path = url.removeprefix("file://")
    if not path:
        raise ValueError(f"{name}: {url} names no path")
    return f"file://{Path(path).expanduser().absolute()}"
