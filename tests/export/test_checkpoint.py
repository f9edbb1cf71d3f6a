import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from export import families
from export.checkpoint import Checkpoint, CheckpointError, locate
from export.families import FamilyError


def copy(checkpoint, to):
    shutil.copytree(checkpoint, to)
    return to


def test_a_directory_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"):
        Checkpoint(tmp_path)


def test_a_truncated_file_is_named(tiny_checkpoint, tmp_path):
    broken = copy(tiny_checkpoint, tmp_path / "c")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        Checkpoint(broken)


def test_a_missing_shard_is_named(tiny_checkpoint, tmp_path):
    broken = copy(tiny_checkpoint, tmp_path / "c")
    (broken / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors: shard is missing"):
        Checkpoint(broken)


def test_shard_names_cannot_leave_the_directory(tiny_checkpoint, tmp_path):
    broken = copy(tiny_checkpoint, tmp_path / "c")
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        Checkpoint(broken)


def test_missing_and_not_finite_tensors_are_named(tiny_checkpoint, tmp_path):
    broken = copy(tiny_checkpoint, tmp_path / "c")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, broken / "model.safetensors")
    checkpoint = Checkpoint(broken)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds NaN"):
        checkpoint.tensor("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"'absent' is missing"):
        checkpoint.tensor("absent")


def test_what_is_neither_directory_nor_hub_id(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        locate(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="a file found"):
        locate(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "not a Mixture-of-Experts model"),
        ({"model_type": "olmo3", "num_experts": 8}, "did you mean 'olmoe'"),
        ({"model_type": "dbrx", "num_local_experts": 8}, "not supported yet"),
    ],
)
def test_other_classes_are_refused_by_name(config, words):
    with pytest.raises(FamilyError, match=words):
        families.of(config, "here")
