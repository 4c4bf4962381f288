"""What a trainer writes by itself, and goes on from."""

import json

import pytest
import torch

from dovetail.types.errors import CheckpointError
from tests.unit.trainers.tiny import make_model, make_rows, make_trainer


def weights_of(trainer):
    return {n: p.detach().clone() for n, p in trainer.backend.policy.model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainer_goes_on_bit_for_bit_from_what_it_wrote(tmp_path, dtype):
    trainer = make_trainer(make_model(dtype=dtype))
    trainer.train(make_rows(seed=1))
    facts = json.loads(json.dumps(trainer.save_into(tmp_path)))
    expected = trainer.train(make_rows(seed=2))
    other = make_trainer(make_model(dtype=dtype, seed=5))
    other.load_from(tmp_path, facts)
    assert other.train(make_rows(seed=2)) == expected
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weights_of(other)[name], weight)


def test_only_safetensors_are_written(tmp_path):
    make_trainer(make_model()).save_into(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}


def test_a_state_of_another_model_is_refused(tmp_path):
    facts = make_trainer(make_model()).save_into(tmp_path)
    other = make_trainer(make_model("Llama"))
    with pytest.raises(CheckpointError, match="another model"):
        other.load_from(tmp_path, facts)


def test_a_damaged_file_is_refused(tmp_path):
    trainer = make_trainer(make_model())
    facts = trainer.save_into(tmp_path)
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        trainer.load_from(tmp_path, facts)


def test_a_state_of_another_backend_is_refused(tmp_path):
    trainer = make_trainer(make_model())
    facts = trainer.save_into(tmp_path)
    facts["policy"]["format"] = "megatron"
    with pytest.raises(CheckpointError, match="train-backend"):
        trainer.load_from(tmp_path, facts)


def test_a_trainer_whose_memory_was_given_up_goes_on_as_before():
    one, other = (make_trainer(make_model(dtype=torch.bfloat16)) for _ in range(2))
    for trainer in (one, other):
        trainer.train(make_rows(seed=1))
    one.offload()
    one.offload()
    held = [*one.backend.optimizer.kept(), *one.backend.policy.placed.kept()]
    assert held and all(tensor.untyped_storage().nbytes() == 0 for tensor in held)
    one.onload()
    assert one.train(make_rows(seed=2)) == other.train(make_rows(seed=2))


def test_weights_that_are_views_of_a_file_are_given_up_and_come_back():
    one, other = (make_trainer(make_model(dtype=torch.bfloat16)) for _ in range(2))
    for tensor in one.backend.policy.placed.kept():
        if tensor.nbytes:
            view = torch.frombuffer(bytearray(bytes(_bytes_of(tensor))), dtype=tensor.dtype)
            tensor.data = view.view(tensor.shape)
    one.offload()
    one.onload()
    assert one.train(make_rows(seed=2)) == other.train(make_rows(seed=2))


def _bytes_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
