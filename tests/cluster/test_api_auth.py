"""Who may do what: keys of tenants, the admin key, and a door without keys."""

from __future__ import annotations

import pytest

from storage.names import UserKey
from tests.cluster.fake_backend import MODEL, quick_client, serving

CHAT = {"model": MODEL, "user": "u1", "messages": [{"role": "user", "content": "Hi"}]}
ACME, OTHER, ADMIN = "key-of-acme", "key-of-other", "key-of-admin"


@pytest.fixture(scope="module")
def served():
    with serving(api_keys={"acme": ACME, "other": OTHER}, admin_key=ADMIN) as door:
        yield door


@pytest.fixture
def backend(served):
    served.backend.reset()
    return served.backend


@pytest.fixture(scope="module")
def http():
    with quick_client() as client:
        yield client


def headers(key, **more):
    return {"Authorization": f"Bearer {key}".strip()} | {
        name.replace("_", "-"): value for name, value in more.items()
    }


def status_of(http, url, method, path, key=None, **more):
    reply = http.request(method, url + path, headers=headers(key, **more) if key is not None else {})
    if reply.is_error:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert key is None or key == "" or key not in reply.text, "a key is never said back"
    return reply.status_code


TENANT_ROUTES = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL}"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/memories"),
    ("POST", "/v1/memories/u1/ingest"),
    ("GET", "/v1/memories/u1"),
    ("GET", "/v1/memories/u1/versions"),
    ("POST", "/v1/memories/u1/rollback"),
    ("PUT", "/v1/memories/u1/pin"),
    ("GET", "/v1/memories/u1/export"),
    ("PUT", "/v1/memories/u1/import"),
    ("DELETE", "/v1/memories/u1"),
]
ADMIN_ROUTES = [
    ("GET", "/admin/shards"),
    ("POST", "/admin/shards/scale"),
    ("POST", "/admin/shards/shard-0/drain"),
    ("POST", "/admin/snapshots"),
]


def test_every_route_is_in_one_of_the_lists(served):
    from cluster.api import build_api
    from tests.cluster.fake_backend import tiny_tokenizer

    app = build_api(served.backend, tiny_tokenizer(), served.settings)
    found = set()
    for route in app.router.routes:
        for inner in getattr(getattr(route, "original_router", None), "routes", [route]):
            found |= {(method, inner.path) for method in inner.methods or () if method != "HEAD"}  # type: ignore[attr-defined]
    names = {"u1": "{user}", "shard-0": "{shard}", MODEL: "{model:path}"}
    listed = set()
    for method, path in TENANT_ROUTES + ADMIN_ROUTES:
        listed.add((method, "/".join(names.get(part, part) for part in path.split("/"))))
    open_to_all = {("GET", path) for path in ("/livez", "/readyz", "/metrics", "/console", "/")}
    assert found == listed | open_to_all


@pytest.mark.parametrize(("method", "path"), TENANT_ROUTES + ADMIN_ROUTES)
@pytest.mark.parametrize("key", [None, "", "wrong", ACME[:-1]])
def test_without_a_known_key_nothing_is_answered(http, served, backend, method, path, key):
    assert status_of(http, served.url, method, path, key) == 401
    assert backend.memories == {}
    assert backend.forgotten == set()


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_a_tenants_key_opens_no_admin_route(http, served, backend, method, path):
    assert status_of(http, served.url, method, path, ACME) == 403
    assert status_of(http, served.url, method, path, ADMIN) in (200, 400)


def test_tenants_have_users_of_their_own(http, served, backend):
    for key in (ACME, OTHER):
        assert http.post(f"{served.url}/v1/chat/completions", json=CHAT, headers=headers(key)).is_success
    assert set(backend.memories) == {UserKey("acme", "u1"), UserKey("other", "u1")}
    assert http.delete(f"{served.url}/v1/memories/u1", headers=headers(ACME)).is_success
    assert set(backend.memories) == {UserKey("other", "u1")}
    listed = http.get(f"{served.url}/v1/memories", headers=headers(ACME)).json()
    assert listed["users"] == []


def test_the_admin_key_acts_for_a_tenant_only_when_it_names_one(http, served, backend):
    assert status_of(http, served.url, "GET", "/v1/memories", ADMIN) == 403
    assert status_of(http, served.url, "GET", "/v1/memories", ADMIN, X_Titan_Tenant="acme") == 200
    assert status_of(http, served.url, "GET", "/v1/memories", ADMIN, X_Titan_Tenant="../acme") == 400
    reply = http.post(
        f"{served.url}/v1/chat/completions", json=CHAT, headers=headers(ACME, X_Titan_Tenant="other")
    )
    assert reply.is_success
    assert set(backend.memories) == {UserKey("acme", "u1")}, "a tenant can name no other"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/console"])
def test_health_needs_no_key(http, served, backend, path):
    assert status_of(http, served.url, "GET", path) == 200


def test_other_spellings_of_the_header(http, served, backend):
    for value, status in ((f"bearer {ACME}", 200), (f"Basic {ACME}", 401), (ACME, 401)):
        reply = http.get(f"{served.url}/v1/models", headers={"Authorization": value})
        assert reply.status_code == status
    assert reply.headers["www-authenticate"] == "Bearer"


def test_without_an_admin_key_the_admin_routes_of_a_door_with_keys_are_closed(http):
    with serving(api_keys={"acme": ACME}) as door:
        assert status_of(http, door.url, "GET", "/admin/shards", ACME) == 403
        assert status_of(http, door.url, "GET", "/admin/shards", "") == 401


def test_an_admin_key_alone_closes_only_the_admin_routes(http):
    with serving(admin_key=ADMIN) as door:
        assert status_of(http, door.url, "GET", "/v1/memories") == 200
        assert status_of(http, door.url, "GET", "/admin/shards") == 403
        assert status_of(http, door.url, "GET", "/admin/shards", ADMIN) == 200


def test_without_keys_a_foreign_web_page_writes_nothing(http):
    with serving() as door:
        for method, path in (("POST", "/v1/memories/u1/ingest"), ("POST", "/admin/shards/scale")):
            reply = http.request(
                method, door.url + path, content=b'{"shards": 2}', headers={"Origin": "https://evil.example"}
            )
            assert reply.status_code == 403
        assert door.backend.memories == {}
        assert door.backend.scaled == []
        own = http.post(f"{door.url}/v1/memories/u1/ingest", content=b"Hello", headers={"Origin": door.url})
        assert own.is_success
