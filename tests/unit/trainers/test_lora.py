"""Low-rank adapters in one process."""

import pytest
import torch
from peft import PeftModel

from dovetail.checkpoint.adapters import FOLDER
from dovetail.checkpoint.hf_export import save_hf_tensors
from dovetail.config.sections import TrainerConfig
from dovetail.trainers.torch.lora import add_adapters
from dovetail.trainers.torch.restore import restore_weights
from dovetail.types.errors import ConfigError
from tests.contract.trained import load
from tests.unit.trainers.tiny import make_model, make_rows, make_trainer

IDS = torch.arange(3, 15)[None]


def adapted(dtype=torch.float32, **settings):
    model = make_model(dtype=dtype)
    add_adapters(model, TrainerConfig(**{"lora_rank": 4, **settings}), seed=1)
    return model


def test_new_adapters_change_nothing_and_alone_are_trained():
    with torch.no_grad():
        assert torch.equal(adapted()(IDS).logits, make_model()(IDS).logits)
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(model).train(make_rows())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in name for name in changed)


def test_the_reference_is_the_model_before_its_training():
    algorithm = {"use_kl_loss": True, "kl_loss_coef": 0.1}
    model, rows = adapted(), make_rows()
    trainer = make_trainer(model, model, algorithm=algorithm)
    expected = trainer.logprobs(rows)
    trainer.train(rows)
    assert trainer.logprobs(rows, reference=True) == expected
    assert trainer.logprobs(rows) != expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_has_them_merged_and_beside(tmp_path, dtype):
    model = adapted(dtype)
    trainer = make_trainer(model)
    trainer.train(make_rows())
    backend = trainer.backend
    place = tmp_path / "out"
    save_hf_tensors(model, backend.hf_tensors(), None, place, beside=backend.beside_export())
    if dtype is torch.bfloat16:
        return
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        torch.testing.assert_close(load(place)(IDS).logits, expected)
        alone = PeftModel.from_pretrained(make_model(), place / FOLDER)
        torch.testing.assert_close(alone(IDS).logits, expected)


def test_a_saved_state_goes_into_a_model_without_adapters():
    model = adapted()
    trainer = make_trainer(model)
    trainer.train(make_rows())
    plain = make_model()
    restore_weights(plain, *trainer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, model.eval()(IDS).logits)


def test_inputs_drop_out_in_training_only():
    model = adapted(lora_dropout=0.5)
    rows = make_rows()
    trainer = make_trainer(model)
    trainer.train(rows)
    assert not any(module.training for module in model.modules())
    assert trainer.logprobs(rows) == trainer.logprobs(rows)


def test_modules_that_do_not_exist_are_told():
    with pytest.raises(ConfigError, match="target_modules"):
        adapted(target_modules=["nowhere"])
