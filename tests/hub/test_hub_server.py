"""Proves the loopback hub server with the real huggingface_hub client, faults and refusals included."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_safetensors_metadata,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    get_session,
)

from qhub.testing.hub_server import HubServer, Limits

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
WEIGHTS = bytes(range(256)) * 1200
CARD = """---
library_name: transformers
tags:
- qhub
- 4-bit
base_model: acme/base
base_model_relation: quantized
license: apache-2.0
---

# A card
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(tokens=TOKENS) as server:
        yield server


@pytest.fixture
def api(hub: HubServer, tmp_path: Path) -> Iterator[HfApi]:
    with hub.activate(token="hf_alice", cache_dir=tmp_path / "home"):
        yield HfApi()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the pauses out of the client's retries, which are seconds long."""
    patient = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time", patient)
    monkeypatch.setattr("huggingface_hub.utils._http.time", patient)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the client keep what it receives in small pieces; a cut costs it the last one."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)


def model_folder(root: Path) -> dict[str, bytes]:
    contents = {
        "README.md": CARD.encode(),
        "config.json": b'{"model_type": "llama"}',
        "empty.txt": b"",
        "extra/notes.txt": b"notes",
        "model.safetensors.index.json": json.dumps({"weight_map": {}}).encode(),
        **{f"model-0000{n}-of-00003.safetensors": WEIGHTS + bytes([n]) for n in (1, 2, 3)},
    }
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return contents


def read_folder(root: str | Path) -> dict[str, bytes]:
    files = (path for path in Path(root).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def upload(path: str, content: bytes | Path | io.BytesIO, **options: object) -> huggingface_hub.CommitInfo:
    return HfApi().upload_file(repo_id="alice/model", path_in_repo=path, path_or_fileobj=content, **options)


def fetch(path: str, **options: object) -> bytes:
    return Path(hf_hub_download("alice/model", path, **options)).read_bytes()


def run_python(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def cached_blobs() -> list[Path]:
    return [path for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if path.is_file()]


def downloads(hub: HubServer, file: str) -> list[str | None]:
    return [r.range for r in hub.requests if r.file == file and r.method == "GET"]


def test_folder_round_trip(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    contents = model_folder(tmp_path / "model")
    assert api.create_repo("model").repo_id == "alice/model"
    commit = api.upload_folder(repo_id="alice/model", folder_path=tmp_path / "model", commit_message="Add it")

    got = read_folder(snapshot_download("alice/model"))
    assert got.pop(".gitattributes").startswith(b"*.7z filter=lfs")
    assert got == contents

    repo = hub.repo("alice/model")
    assert {p for p, file in repo.files.items() if file.lfs} == {p for p in contents if p.endswith("rs")}
    assert [(c.title, c.author) for c in repo.commits] == [("Add it", "alice"), ("initial commit", "system")]
    assert commit.oid == repo.head.oid == api.model_info("alice/model").sha
    assert not repo.private


def test_unchanged_files_are_not_uploaded_again(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    api.create_repo("model")
    api.upload_folder(repo_id="alice/model", folder_path=tmp_path / "model")
    hub.requests.clear()
    api.upload_folder(repo_id="alice/model", folder_path=tmp_path / "model")
    assert len(hub.repo("alice/model").commits) == 2

    (tmp_path / "model" / "model-00002-of-00003.safetensors").write_bytes(b"new" + WEIGHTS)
    api.upload_folder(repo_id="alice/model", folder_path=tmp_path / "model")
    assert len(hub.repo("alice/model").commits) == 3
    assert [request.method for request in hub.requests].count("PUT") == 1


def test_uploads_in_parts_and_from_memory(tmp_path: Path) -> None:
    limits = Limits(lfs=1000, multipart=100_000, part=64_000, object=400_000)
    with HubServer(tokens=TOKENS, limits=limits) as hub, hub.activate(token="hf_alice"):
        api = HfApi()
        api.create_repo("model")
        (tmp_path / "big.safetensors").write_bytes(WEIGHTS)
        parts = {"big.safetensors": tmp_path / "big.safetensors", "big.txt": io.BytesIO(b"x" * 1001)}
        for path, content in parts.items():
            upload(path, content)
        upload("small.txt", b"x" * 1000)
        with pytest.raises(ValueError, match="larger than the 400000 bytes allowed"):
            upload("huge.bin", b"x" * 400_001)

        repo = hub.repo("alice/model")
        assert repo.read("big.safetensors") == fetch("big.safetensors") == WEIGHTS
        assert repo.files["big.safetensors"].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
        assert repo.files["big.txt"].lfs
        assert not repo.files["small.txt"].lfs
        assert sum(r.path.startswith("/objects/") and "/parts/" in r.path for r in hub.requests) == 5


def test_repository_life(hub: HubServer, api: HfApi) -> None:
    assert api.whoami()["name"] == "alice"
    api.create_repo("alice/model", private=True)
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("alice/model")
    assert api.create_repo("alice/model", exist_ok=True).repo_id == "alice/model"
    assert hub.repo("alice/model").private
    api.update_repo_settings("alice/model", private=False)
    assert not api.model_info("alice/model").private
    api.create_repo("alice/model", repo_type="dataset")
    assert api.repo_info("alice/model", repo_type="dataset").id == "alice/model"
    api.delete_repo("alice/model")
    assert not api.repo_exists("alice/model")
    assert api.repo_exists("alice/model", repo_type="dataset")
    with pytest.raises(KeyError, match="no model repository"):
        hub.repo("alice/model")
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        api.create_repo("bob/model")


def test_revisions(hub: HubServer, api: HfApi) -> None:
    first = hub.add_repo("alice/model", {"a.txt": b"1", "dir/b.bin": b"22"}).head
    api.create_tag("alice/model", tag="v1")
    api.create_branch("alice/model", branch="try/it")
    upload("a.txt", b"3", revision="try/it")
    api.delete_file("dir/b.bin", "alice/model")
    pull = upload("c.txt", b"4", create_pr=True)

    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    assert set(hub.repo("alice/model").files) == {".gitattributes", "a.txt"}
    for revision, content in (("try/it", b"3"), ("v1", b"1"), (first.oid, b"1"), ("main", b"1")):
        assert fetch("a.txt", revision=revision) == content
    assert api.file_exists("alice/model", "c.txt", revision="refs/pr/1")
    names = {branch.name for branch in api.list_repo_refs("alice/model").branches}
    assert names == {"main", "try/it"}
    assert api.list_repo_commits("alice/model", revision="v1")[0].commit_id == first.oid
    with pytest.raises(RevisionNotFoundError):
        api.model_info("alice/model", revision="nowhere")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        upload("a.txt", b"5", parent_commit=first.oid)


def test_listing(hub: HubServer, api: HfApi) -> None:
    hub.add_repo("alice/model", {"a.txt": b"1", "dir/b.bin": b"22", "dir/deep/c.txt": b"3"})
    tree = {entry.path: entry for entry in api.list_repo_tree("alice/model", recursive=True)}
    assert set(tree) == {".gitattributes", "a.txt", "dir", "dir/b.bin", "dir/deep", "dir/deep/c.txt"}
    assert tree["dir/b.bin"].lfs.sha256 == hashlib.sha256(b"22").hexdigest()
    assert tree["a.txt"].lfs is None
    assert [e.path for e in api.list_repo_tree("alice/model", "dir")] == ["dir/deep", "dir/b.bin"]
    assert [e.path for e in api.get_paths_info("alice/model", ["dir", "a.txt", "no"])] == ["dir", "a.txt"]
    sizes = {s.rfilename: s.size for s in api.model_info("alice/model", files_metadata=True).siblings}
    assert sizes["dir/b.bin"] == 2
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("alice/model", "nothing"))


def test_card_gives_tags(hub: HubServer, api: HfApi) -> None:
    api.create_repo("model", private=True)
    upload("README.md", CARD.encode())
    info = api.model_info("alice/model")
    assert info.tags == hub.repo("alice/model").tags
    assert info.tags == [
        *("transformers", "qhub", "4-bit", "base_model:acme/base", "base_model:quantized:acme/base"),
        "license:apache-2.0",
    ]
    assert info.card_data.base_model == "acme/base"
    assert info.library_name == "transformers"
    assert info.private
    assert hub.repo("alice/model").card == CARD


@pytest.mark.parametrize(
    ("front_matter", "message"),
    [
        ("tags: [a", "Invalid YAML"),
        ("base_model: /home/me/checkpoint", "Use a model id"),
        ("tags: [{a: b}]", "list of strings"),
        ("- a", "must be a mapping"),
    ],
)
@pytest.mark.usefixtures("api")
def test_bad_card_is_refused_before_any_upload(hub: HubServer, front_matter: str, message: str) -> None:
    hub.add_repo("alice/model", {})
    card = f"---\n{front_matter}\n---\n".encode()
    with pytest.raises(ValueError, match=message):
        upload("README.md", card)
    assert len(hub.repo("alice/model").commits) == 2


def test_card_without_front_matter_is_warned_about(hub: HubServer, api: HfApi) -> None:
    hub.add_repo("alice/model", {})
    with pytest.warns(UserWarning, match="missing yaml metadata"):
        upload("README.md", b"# Bare")
    assert hub.repo("alice/model").tags == []


def test_private_repository_needs_its_owner(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("alice/model", {"w.safetensors": WEIGHTS}, private=True)
    with hub.activate(token="hf_alice"):
        assert fetch("w.safetensors") == WEIGHTS
    for token, status in ((None, 401), ("hf_bob", 404)):
        with hub.activate(token=token):
            for call in (
                HfApi().model_info,
                snapshot_download,
                lambda r: hf_hub_download(r, "w.safetensors"),
            ):
                with pytest.raises(RepositoryNotFoundError) as error:
                    call("alice/model")
                assert error.value.response.status_code == status
            with pytest.raises(RepositoryNotFoundError):
                upload("a.txt", b"1")
    with hub.activate(token="hf_wrong"):
        for call in (
            HfApi().model_info,
            lambda r: hf_hub_download(r, "w.safetensors"),
            lambda r: HfApi().whoami(),
        ):
            with pytest.raises(HfHubHTTPError, match=r"Invalid (credentials|user token)") as error:
                call("alice/model")
            assert error.value.response.status_code == 401
            assert not isinstance(error.value, RepositoryNotFoundError)


def test_public_repository_is_read_by_all_and_written_by_its_owner(hub: HubServer) -> None:
    hub.add_repo("alice/model", {"a.txt": b"1"})
    with hub.activate():
        assert fetch("a.txt") == b"1"
        with pytest.raises(HfHubHTTPError, match="401"):
            upload("a.txt", b"2")
        with pytest.raises(HfHubHTTPError, match="401"):
            HfApi().create_repo("model")
    with hub.activate(token="hf_bob"), pytest.raises(HfHubHTTPError, match="no right to write"):
        upload("a.txt", b"2")
    assert len(hub.repo("alice/model").commits) == 2


def test_gated_repository(hub: HubServer, api: HfApi) -> None:
    hub.add_repo("alice/model", {"a.txt": b"1"})
    api.update_repo_settings("alice/model", gated="auto")
    assert api.file_exists("alice/model", "a.txt")
    for token, status in ((None, 401), ("hf_bob", 403)):
        with hub.activate(token=token):
            assert HfApi().model_info("alice/model").gated == "auto"
            with pytest.raises(GatedRepoError) as error:
                hf_hub_download("alice/model", "a.txt")
            assert error.value.response.status_code == status


def test_missing_file_is_remembered_by_the_client(hub: HubServer, api: HfApi) -> None:
    hub.add_repo("alice/model", {})
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("alice/model", "adapter_config.json")
    cached = huggingface_hub.try_to_load_from_cache("alice/model", "adapter_config.json")
    assert cached is huggingface_hub._CACHED_NO_EXIST


@pytest.mark.parametrize("file", ["config.json", "w.safetensors"])
def test_second_download_only_asks_for_the_etag(hub: HubServer, api: HfApi, file: str) -> None:
    hub.add_repo("alice/model", {file: WEIGHTS})
    first = hf_hub_download("alice/model", file)
    assert downloads(hub, file) == [None]
    hub.requests.clear()
    assert hf_hub_download("alice/model", file) == first
    assert [request.method for request in hub.requests] == ["HEAD"]
    hub.requests.clear()
    assert hf_hub_download("alice/model", file, revision=hub.repo("alice/model").head.oid) == first
    assert hub.requests == []


@pytest.mark.usefixtures("no_waiting", "small_pieces")
@pytest.mark.parametrize("file", ["config.json", "w.safetensors"])
def test_cut_download_is_resumed(hub: HubServer, api: HfApi, file: str) -> None:
    hub.add_repo("alice/model", {file: WEIGHTS})
    hub.faults.cut(file, after=123_456, times=2)
    assert fetch(file) == WEIGHTS
    assert downloads(hub, file) == [None, "bytes=120000-", "bytes=240000-"]


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("into_folder", [False, True])
def test_cut_download_leaves_no_truncated_file(
    hub: HubServer, api: HfApi, tmp_path: Path, reset: bool, into_folder: bool
) -> None:
    hub.add_repo("alice/model", {"w.safetensors": WEIGHTS})
    hub.faults.cut("*.safetensors", after=100_000, times=6, reset=reset)
    target = {"local_dir": tmp_path / "target"} if into_folder else {}

    # The two client versions sit on httpx and httpx2, which have the same errors in different packages.
    errors = importlib.import_module(type(get_session()).__module__.split(".")[0])
    with pytest.raises((errors.RemoteProtocolError, errors.ReadError)):
        hf_hub_download("alice/model", "w.safetensors", **target)
    assert cached_blobs() == []
    assert not list((tmp_path / "target").glob("*.safetensors"))

    hub.faults.clear()
    assert fetch("w.safetensors", **target) == WEIGHTS


@pytest.mark.usefixtures("no_waiting")
def test_cut_and_unavailable_uploads_are_repeated(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(WEIGHTS)
    api.create_repo("model")
    hub.faults.cut_upload(after=70_000)
    hub.faults.unavailable(method="PUT", times=2)
    upload("w.safetensors", tmp_path / "w.safetensors")
    assert hub.repo("alice/model").read("w.safetensors") == WEIGHTS
    assert [r.status for r in hub.requests if r.method == "PUT"] == [503, 503, 0, 200]


@pytest.mark.usefixtures("no_waiting")
def test_unavailable_hub(hub: HubServer, api: HfApi) -> None:
    hub.add_repo("alice/model", {"a.txt": b"1"})
    hub.faults.unavailable(method="HEAD", times=2)
    assert fetch("a.txt") == b"1"

    hub.faults.unavailable(path="*/commit/*")
    with pytest.raises(HfHubHTTPError) as error:
        upload("b.txt", b"2")
    assert error.value.response.status_code == 503
    assert "b.txt" not in hub.repo("alice/model").files

    hub.faults.unavailable(method="HEAD", times=100)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("alice/model", ".gitattributes")


def test_corrupt_download_has_one_wrong_byte(hub: HubServer, api: HfApi) -> None:
    # The client compares sizes, not hashes: what checks content is up to its callers.
    hub.add_repo("alice/model", {"w.safetensors": WEIGHTS})
    hub.faults.corrupt("w.safetensors", at=200_000)
    got = fetch("w.safetensors")
    assert [n for n, pair in enumerate(zip(got, WEIGHTS, strict=True)) if len(set(pair)) == 2] == [200_000]
    again = hf_hub_download("alice/model", "w.safetensors", force_download=True)
    assert Path(again).read_bytes() == WEIGHTS


def test_ranges(hub: HubServer, api: HfApi) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"abcd"
    hub.add_repo("alice/model", {"model.safetensors": content})
    metadata = get_safetensors_metadata("alice/model").files_metadata["model.safetensors"]
    assert metadata.tensors["w"].shape == [4]

    url = huggingface_hub.hf_hub_url("alice/model", "model.safetensors")
    for wanted, expected in (("0-3", content[:4]), ("5-", content[5:]), ("-4", b"abcd"), ("0-9999", content)):
        response = get_session().get(url, headers={"Range": f"bytes={wanted}"})
        assert (response.status_code, response.content) == (206, expected)
        assert response.headers["Content-Range"].endswith(f"/{len(content)}")
    assert get_session().get(url, headers={"Range": f"bytes={len(content)}-"}).status_code == 416


def test_head_of_an_lfs_file_has_what_the_client_reads(hub: HubServer, api: HfApi) -> None:
    repo = hub.add_repo("alice/model", {"w.safetensors": WEIGHTS})
    metadata = get_hf_file_metadata(huggingface_hub.hf_hub_url("alice/model", "w.safetensors"))
    assert (metadata.commit_hash, metadata.size) == (repo.head.oid, len(WEIGHTS))
    assert metadata.etag == hashlib.sha256(WEIGHTS).hexdigest()
    assert metadata.xet_file_data is None
    assert not metadata.location.startswith(hub.endpoint)
    assert get_session().get(metadata.location).content == WEIGHTS
    assert get_session().get(metadata.location.replace("w.safe", "v.safe")).status_code == 403
    token = {"Authorization": "Bearer hf_alice"}
    assert get_session().get(metadata.location, headers=token).status_code == 400


@pytest.mark.parametrize("path", ["../x", "a/../b", "/x", "a//b", ".git/config", "a\\b", "a\nb", ""])
def test_unsafe_paths_are_refused(hub: HubServer, api: HfApi, path: str) -> None:
    hub.add_repo("alice/model", {})
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": path, "content": "eA==", "encoding": "base64"}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    url = f"{hub.endpoint}/api/models/alice/model/commit/main"
    response = get_session().post(url, content=body, headers={"Authorization": "Bearer hf_alice"})
    assert response.status_code == 400
    assert "Invalid path" in response.json()["error"]
    assert len(hub.repo("alice/model").commits) == 2


def test_requests_that_are_refused(hub: HubServer, api: HfApi) -> None:
    hub.add_repo("alice/model", {})
    owner = {"Authorization": "Bearer hf_alice"}
    commit = f"{hub.endpoint}/api/models/alice/model/commit/main"
    lfs = {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": lfs}]
    body = "\n".join(map(json.dumps, lines)).encode()
    answers = {
        "was not uploaded": get_session().post(commit, content=body, headers=owner),
        "Malformed line": get_session().post(commit, content=b"{", headers=owner),
        "no summary": get_session().post(commit, content=b"", headers=owner),
        "HF_HUB_DISABLE_XET": get_session().get(commit.replace("commit", "xet-write-token")),
        "Nothing is at": get_session().get(f"{hub.endpoint}/api/elsewhere"),
        "not served at": get_session().delete(commit),
    }
    for message, response in answers.items():
        assert response.status_code in (400, 404, 405)
        assert message in response.json()["error"]


def test_chunked_request_bodies_are_read(hub: HubServer) -> None:
    content = json.dumps({"content": "---\ntags: {}\n---\n" + "x" * 100_000}).encode()
    pieces = (content[start : start + 33_333] for start in range(0, len(content), 33_333))
    response = get_session().post(f"{hub.endpoint}/api/validate-yaml", content=pieces)
    assert response.request.headers["Transfer-Encoding"] == "chunked"
    assert (response.status_code, len(response.json()["errors"])) == (400, 1)


def test_environment_serves_another_process(hub: HubServer, tmp_path: Path) -> None:
    script = """if True:
        from huggingface_hub import HfApi, hf_hub_download
        HfApi().create_repo("model")
        HfApi().upload_file(repo_id="alice/model", path_in_repo="w.safetensors", path_or_fileobj=b"abc")
        print(hf_hub_download("alice/model", "w.safetensors"))
    """
    environment = {**os.environ, **hub.environment(token="hf_alice", cache_dir=tmp_path)}
    done = run_python(script, environment)
    path = Path(done.stdout.strip())
    assert path.read_bytes() == hub.repo("alice/model").read("w.safetensors") == b"abc"
    assert path.is_relative_to(tmp_path)


def test_activation_is_undone(hub: HubServer, tmp_path: Path) -> None:
    def settings() -> tuple[str | None, ...]:
        return (
            *(constants.ENDPOINT, constants.HF_HUB_CACHE, huggingface_hub.get_token(), HfApi().endpoint),
            huggingface_hub.hf_hub_url("a/b", "c"),
            huggingface_hub.hf_api.api.endpoint,
            os.environ.get("HF_ENDPOINT"),
        )

    before = settings()
    with hub.activate(token="hf_alice", cache_dir=tmp_path):
        assert huggingface_hub.whoami()["name"] == "alice"
        assert not set(settings()) & set(before)
        with hub.activate():
            assert huggingface_hub.get_token() is None
        assert huggingface_hub.get_token() == "hf_alice"
    assert settings() == before


def test_failure_of_the_server_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    def be_served() -> None:
        with HubServer(tokens=TOKENS) as hub:
            monkeypatch.setattr(hub.state.store, "get", fail)
            assert get_session().get(f"{hub.endpoint}/api/models/alice/model").status_code == 500

    with pytest.raises(RuntimeError, match=r"failed on 1 request"):
        be_served()
    hub = HubServer()
    with pytest.raises(RuntimeError, match="not running"):
        _ = hub.endpoint


def test_import_is_light() -> None:
    script = """if True:
        import sys, qhub.testing
        before = set(sys.modules)
        import qhub.testing.hub_server
        print({"torch", "transformers", "huggingface_hub"} & (set(sys.modules) - before))
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert run_python(script, environment).stdout.strip() == "set()"
