"""Quantized models go to a Hub and come back: the real client, a loopback server, users in processes of their own."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import PushToHubMixin

from qhub import QuantizedTensor
from qhub.errors import CheckpointError
from qhub.integrations.hub import push_quantized, start_push
from qhub.testing.hub_server import HubServer

IDS = torch.arange(1, 10)[None]
THEIRS = """---
license: mit # chosen with care
tags:
- mine
---

# Words of a person
"""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(answer: dict[str, Any], expected: torch.Tensor) -> bool:
    return torch.equal(torch.tensor(answer["logits"]), expected)


@pytest.fixture(scope="module")
def quantize(tiny: Callable[[str], Path], pow2: str) -> Callable[..., Any]:
    def make(**config: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            tiny("llama"), quantization_config={"quant_method": pow2, **config}
        )
        # As if it had been loaded from the Hub.
        model.config._name_or_path = "acme/base"
        return model

    return make


@pytest.fixture
def model(quantize: Callable[..., Any]) -> Any:
    return quantize()


class Published:
    """Holds a Hub with pushed models, and the logits that each had before."""

    def __init__(self, hub: HubServer, quantize: Callable[..., Any]) -> None:
        self.hub = hub
        first, second = quantize(group_size=32), quantize(group_size=16)
        self.expected = {"first": logits(first), "second": logits(second)}
        first.push_to_hub("whole", commit_message="Add it", commit_description="At length")
        first.push_to_hub("alice/sharded", max_shard_size="20KB")
        first.push_to_hub("alice/private", private=True)
        second.push_to_hub("alice/whole", revision="coarse")


@pytest.fixture(scope="module")
def published(quantize: Callable[..., Any]) -> Iterator[Published]:
    with HubServer(tokens={"hf_alice": "alice", "hf_bob": "bob"}) as hub:
        with hub.activate(token="hf_alice"):
            content = Published(hub, quantize)
        yield content


# -- pulling ---------------------------------------------------------------------------------------------------------


def test_logits_survive_push_and_pull(published: Published, user: Callable[..., Any]) -> None:
    hub = published.hub
    assert not torch.equal(published.expected["first"], published.expected["second"])
    names = [name for name in hub.repo("alice/sharded").files if name.endswith(".safetensors")]
    assert len(names) > 3
    answers = user(
        hub.environment(token="hf_alice"),
        {"pretrained_model_name_or_path": "alice/whole"},
        {"pretrained_model_name_or_path": "alice/sharded"},
        {"pretrained_model_name_or_path": "alice/private"},
        {"pretrained_model_name_or_path": "alice/whole", "revision": "coarse"},
    )
    for answer, key in zip(answers, ["first", "first", "first", "second"], strict=True):
        assert same(answer, published.expected[key]), answer


def test_what_may_not_or_cannot_be_loaded(published: Published, user: Callable[..., Any]) -> None:
    """Each is one clear error; `token` in a call is what the user passes to from_pretrained."""
    hub = published.hub
    config = json.loads(hub.repo("alice/whole").read("config.json"))
    config["quantization_config"]["quant_method"] = "no_such"
    weights = hub.repo("alice/whole").read("model.safetensors")
    hub.add_repo("alice/unknown", {"config.json": json.dumps(config).encode(), "model.safetensors": weights})
    private = {"pretrained_model_name_or_path": "alice/private"}
    nobody, wrong, other, unknown, missing = user(
        hub.environment(),
        private,
        {**private, "token": "hf_wrong"},
        {**private, "token": "hf_bob"},
        {"pretrained_model_name_or_path": "alice/unknown"},
        {"pretrained_model_name_or_path": "alice/whole", "revision": "nowhere"},
    )
    for answer in (nobody, wrong, other):
        assert "OSError" in answer["error"]
        assert "alice/private" in answer["message"]
    assert "token" in nobody["message"]
    assert unknown["error"][0] == "UnknownMethodError"
    assert "pip install qhub-no-such" in unknown["message"]
    assert "nowhere" in missing["message"]
    assert not any(answer["loaded"] for answer in (nobody, wrong, other, unknown, missing))


def test_a_cut_download_goes_on(published: Published, user: Callable[..., Any]) -> None:
    hub = published.hub
    hub.requests.clear()
    hub.faults.cut("model.safetensors", after=10_000)
    (answer,) = user(hub.environment(), {"pretrained_model_name_or_path": "alice/whole"})
    assert same(answer, published.expected["first"])
    sent = [r for r in hub.requests if r.file == "model.safetensors" and r.method == "GET"]
    assert len(sent) == 2


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(("repo", "file"), [("whole", "model.safetensors"), ("sharded", "model-00002-of-*")])
@pytest.mark.parametrize("reset", [False, True])
def test_a_download_that_keeps_breaking_is_an_error_and_a_later_try_works(
    published: Published, tmp_path: Path, repo: str, file: str, reset: bool
) -> None:
    hub = published.hub
    with hub.activate(cache_dir=tmp_path):
        hub.faults.cut(file, after=500, times=50, reset=reset)
        # An error of httpx, or httpx2; where one file is the whole model, below transformers' "Can't load the model".
        with pytest.raises(Exception) as error:
            AutoModelForCausalLM.from_pretrained(f"alice/{repo}")
        assert re.search(r"closed connection|reset by peer", "\n".join(map(str, chain(error.value)))), error.value
        hub.faults.clear()
        again = AutoModelForCausalLM.from_pretrained(f"alice/{repo}")
    assert torch.equal(logits(again), published.expected["first"])


def test_a_wrong_byte_in_the_header_is_an_error(published: Published, tmp_path: Path) -> None:
    with published.hub.activate(cache_dir=tmp_path):
        published.hub.faults.corrupt("model.safetensors", at=20)
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*damaged"):
            AutoModelForCausalLM.from_pretrained("alice/whole")


def test_a_wrong_byte_among_the_weights_is_found_by_the_clients_own_check_only(
    published: Published, tmp_path: Path
) -> None:
    """Any byte is a valid code, and neither the client nor safetensors checks a hash when loading.

    `hf cache verify alice/whole` (verify_repo_checksums) compares the cache with the Hub's hashes.
    """
    hub = published.hub
    with hub.activate(cache_dir=tmp_path):
        size = len(hub.repo("alice/whole").read("model.safetensors"))
        offset = code_offset(hub.repo("alice/whole").read("model.safetensors"), tmp_path / "copy.safetensors")
        assert 0 < offset < size
        hub.faults.corrupt("model.safetensors", at=offset)
        model = AutoModelForCausalLM.from_pretrained("alice/whole")
        assert not torch.equal(logits(model), published.expected["first"])
        (mismatch,) = HfApi().verify_repo_checksums("alice/whole").mismatches
        assert mismatch["path"] == "model.safetensors"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def code_offset(content: bytes, scratch: Path) -> int:
    scratch.write_bytes(content)
    with safe_open(scratch, framework="pt") as opened:
        name = next(key for key in opened.keys() if key.endswith("down_proj.pow2_codes"))  # noqa: SIM118
    header = int.from_bytes(content[:8], "little")
    return 8 + header + json.loads(content[8 : 8 + header])[name]["data_offsets"][0]


# -- the card --------------------------------------------------------------------------------------------------------


def test_card_and_tags_of_a_pushed_model(published: Published, tmp_path: Path) -> None:
    with published.hub.activate(cache_dir=tmp_path):
        info = HfApi().model_info("alice/whole")
        text = ModelCard.load("alice/whole").text
    assert {"qhub", "pow2", "4-bit", "quantized", "text-generation", "base_model:quantized:acme/base"} <= set(info.tags)
    assert info.card_data.base_model == "acme/base"
    assert info.library_name == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("alice/whole")' in text
    assert "(registered in this process)" not in text


def test_one_commit_and_its_words(published: Published) -> None:
    (commit, initial) = published.hub.repo("alice/whole").commits
    assert (commit.title, initial.title) == ("Add it", "initial commit")


def test_a_persons_card_is_kept_with_tags_added(alice: HubServer, model: Any) -> None:
    alice.add_repo("alice/model", {"README.md": THEIRS.encode()})
    model.add_model_tags("of-the-model")
    model.push_to_hub("alice/model", tags=["of-the-call"])
    card = ModelCard(alice.repo("alice/model").card)
    assert card.data.tags == ["mine", "qhub", "pow2", "quantized", "4-bit", "of-the-model", "of-the-call"]
    assert card.data.license == "mit"
    assert card.text == "\n# Words of a person\n"
    kept = alice.repo("alice/model").card
    model.push_to_hub("alice/model")
    assert alice.repo("alice/model").card == kept


def test_qhubs_own_card_is_written_anew(alice: HubServer, quantize: Callable[..., Any]) -> None:
    """A second push with other settings must not leave the numbers of the first; base model and tags go over."""
    quantize(group_size=16).push_to_hub("model", tags="dear")
    first = alice.repo("alice/model").card
    assert "| bits per quantized weight | 6.1" in first
    again = AutoModelForCausalLM.from_pretrained("alice/model")
    assert again.config._name_or_path == "alice/model"
    again.push_to_hub("alice/model")
    assert alice.repo("alice/model").card == first
    other = quantize(group_size=32)
    other.config._name_or_path = "alice/model"
    other.push_to_hub("alice/model")
    second = alice.repo("alice/model").card
    assert "| bits per quantized weight | 5.1" in second
    assert ModelCard(second).data.base_model == "acme/base"
    assert ModelCard(second).data.tags == ["qhub", "pow2", "quantized", "4-bit", "dear"]


@pytest.mark.usefixtures("no_waiting")
def test_a_card_that_cannot_be_fetched_is_not_overwritten(alice: HubServer, model: Any) -> None:
    alice.add_repo("alice/model", {"README.md": b"an older card, which the cache holds"})
    api = HfApi()
    api.hf_hub_download("alice/model", "README.md")
    api.upload_file(repo_id="alice/model", path_in_repo="README.md", path_or_fileobj=THEIRS.encode())
    alice.faults.unavailable(method="HEAD", path="*/README.md", times=100)
    with pytest.raises(LocalEntryNotFoundError):
        model.push_to_hub("alice/model")
    assert alice.repo("alice/model").card == THEIRS
    alice.faults.clear()
    model.push_to_hub("alice/model")
    assert "Words of a person" in alice.repo("alice/model").card


@pytest.mark.parametrize(
    ("content", "message"), [(b"---\ntags: [a\n---\n", "is not valid"), (b"\xff\xfe", "is not UTF-8")]
)
def test_a_card_that_cannot_be_read_stops_the_push(alice: HubServer, model: Any, content: bytes, message: str) -> None:
    alice.add_repo("alice/model", {"README.md": content})
    with pytest.raises(CheckpointError, match=rf"README\.md of alice/model {message}"):
        model.push_to_hub("alice/model")
    assert "model.safetensors" not in alice.repo("alice/model").files


def test_card_of_a_branch(alice: HubServer, model: Any) -> None:
    """A new branch gets main's card, a branch with a card of its own keeps it."""
    alice.add_repo("alice/model", {"README.md": THEIRS.encode()})
    model.push_to_hub("alice/model", revision="try")
    assert alice.repo("alice/model").card == THEIRS
    api = HfApi()
    first = Path(api.hf_hub_download("alice/model", "README.md", revision="try")).read_text()
    assert "Words of a person" in first and "- qhub" in first
    branch = THEIRS.replace("person", "branch").encode()
    api.upload_file(repo_id="alice/model", path_in_repo="README.md", path_or_fileobj=branch, revision="try")
    model.push_to_hub("alice/model", revision="try")
    text = Path(api.hf_hub_download("alice/model", "README.md", revision="try")).read_text()
    assert "Words of a branch" in text and "- qhub" in text
    assert set(alice.repo("alice/model").files) == {".gitattributes", "README.md"}


# -- pushing ---------------------------------------------------------------------------------------------------------


def test_all_arguments_of_transformers_are_taken() -> None:
    def names(function: Any) -> set[str]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}

    theirs = names(PushToHubMixin.push_to_hub) - {"self"}
    # create_repo's arguments are the rest that start_push passes on.
    assert theirs <= names(push_quantized) | names(start_push) | names(HfApi.create_repo)


def test_pull_request_and_a_given_token(hub: HubServer, model: Any) -> None:
    with hub.activate():
        with pytest.raises(HfHubHTTPError, match="401"):
            model.push_to_hub("alice/model")
        commit = model.push_to_hub("alice/model", token="hf_alice", create_pr=True, private=True)
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert hub.repo("alice/model").private
    assert set(hub.repo("alice/model").files) == {".gitattributes"}
    with hub.activate(token="hf_alice"):
        again = AutoModelForCausalLM.from_pretrained("alice/model", revision="refs/pr/1")
        assert torch.equal(logits(again), logits(model))


def test_a_push_replaces_the_weights_of_an_earlier_one(alice: HubServer, quantize: Callable[..., Any]) -> None:
    """transformers loads model.safetensors before it looks for shards, so an old one would win over new shards."""
    others = {"notes.safetensors": b"x", "model.fp16.safetensors": b"x", "extra/model.safetensors": b"x"}
    alice.add_repo("alice/model", others)
    quantize(group_size=16).push_to_hub("alice/model")
    new = quantize(group_size=32)
    new.push_to_hub("alice/model", max_shard_size="20KB")
    files = set(alice.repo("alice/model").files)
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("alice/model")), logits(new))
    new.push_to_hub("alice/model")
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors", ".gitattributes", *others}
    assert set(alice.repo("alice/model").files) == expected


def test_save_pretrained_pushes(alice: HubServer, model: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # The client warns when a commit writes a file twice.
        warnings.simplefilter("error", UserWarning)
        result = model.save_pretrained(tmp_path / "named", push_to_hub=True, private=True, commit_message="Here")
    assert result is None
    repo = alice.repo("alice/named")
    assert repo.private
    assert [commit.title for commit in repo.commits] == ["Here", "initial commit"]
    assert 'from_pretrained("alice/named")' in repo.card
    assert {"qhub", "4-bit"} <= set(repo.tags)
    folder = {f.name for f in (tmp_path / "named").iterdir()}
    assert set(repo.files) - {".gitattributes"} == folder
    assert repo.read("model.safetensors") == (tmp_path / "named" / "model.safetensors").read_bytes()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("alice/named")), logits(model))


def test_save_pretrained_pushes_the_folders_card_and_no_other_file(
    alice: HubServer, model: Any, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(THEIRS)
    (tmp_path / "diary.txt").write_text("private")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="alice/other", token="hf_alice", revision="main")
    assert "Words of a person" in alice.repo("alice/other").card
    assert "4-bit" in alice.repo("alice/other").tags
    assert "diary.txt" not in alice.repo("alice/other").files
    assert (tmp_path / "README.md").read_text() == THEIRS


@pytest.mark.usefixtures("no_waiting")
def test_a_push_that_fails_leaves_the_saved_model_and_the_repository_whole(
    alice: HubServer, model: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    alice.faults.unavailable(path="*/commit/*", times=50)
    with pytest.raises(HfHubHTTPError, match="503"):
        model.save_pretrained(folder, push_to_hub=True)
    assert set(alice.repo("alice/model").files) == {".gitattributes"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    assert not list(tmp_path.glob(".model.saving-*"))
    alice.faults.clear()
    alice.faults.cut_upload(after=1000)
    model.save_pretrained(folder, push_to_hub=True)
    assert alice.repo("alice/model").read("model.safetensors") == (folder / "model.safetensors").read_bytes()


def test_only_quantized_models_are_pushed_by_qhub(alice: HubServer, tiny: Callable[[str], Path]) -> None:
    plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    plain.push_to_hub("plain")
    assert "qhub" not in alice.repo("alice/plain").card
    assert not any(isinstance(p, QuantizedTensor) for p in plain.parameters())


@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
def test_a_loaded_adapter_is_pushed_as_transformers_does(alice: HubServer, model: Any, tmp_path: Path, by: str) -> None:
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    if by == "push_to_hub":
        model.push_to_hub("alice/adapter")
    else:
        model.save_pretrained(tmp_path / "adapter", push_to_hub=True)
    files = set(alice.repo("alice/adapter").files)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files
    assert "pow2" not in alice.repo("alice/adapter").card
