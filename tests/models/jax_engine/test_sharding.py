"""Which mesh a layout makes, what it refuses, and where parameters lie."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from models.engine import Layout

pytest.importorskip("jax")

import jax
from jax.sharding import AxisType, PartitionSpec

from models.jax_engine.parameters import stacked_shape, stacks
from models.jax_engine.sharding import parameter_axes, sharding_of
from tests.models.tiny import COMPOSITIONS, tiny

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "layout",
    [Layout(data=2), Layout(fsdp=2), Layout(tensor=3), Layout(data=1, fsdp=2, tensor=2)],
    ids=lambda layout: str(layout.model_dump(exclude_defaults=True)),
)
def test_a_layout_of_more_devices_than_there_are_is_refused(layout: Layout) -> None:
    with pytest.raises(UserError, match="does not fit 1 devices"):
        sharding_of(layout, tiny("llama"), jax.devices()[:1])


_ON_EIGHT = """
import jax
from jax.sharding import PartitionSpec
from common.errors import UserError
from models.engine import Layout
from models.jax_engine.sharding import parameter_axes, sharding_of
from tests.models.tiny import tiny
devices, config = jax.devices(), tiny("llama", vocab_size=24)
assert dict(sharding_of(Layout(), config, devices).mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
mesh = sharding_of(Layout(fsdp=2, tensor=2), config, devices)
assert dict(mesh.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
assert mesh.row_parts == 4
assert sharding_of(Layout(data=1), config, devices).mesh.size == 1
name = "layers.attention.q_proj.weight"
assert mesh.of_parameter(name, 3).spec == PartitionSpec(None, "tensor", "fsdp")
assert mesh.spec(parameter_axes(name, 3), gathered=True) == PartitionSpec(None, "tensor", None)
assert mesh.of("rows", "whole").spec == PartitionSpec(("data", "fsdp"), None)
for layout, expected in (
    (Layout(fsdp=3), "does not fit 8 devices"),
    (Layout(data=16), "does not fit 8 devices"),
    (Layout(tensor=8), "layout.tensor 8 does not divide the model's num_attention_heads 4"),
    (Layout(tensor=4), "layout.tensor 4 does not divide the model's num_key_value_heads 2"),
):
    try:
        sharding_of(layout, config, devices)
    except UserError as error:
        assert expected in str(error), error
    else:
        raise AssertionError(layout)
try:
    sharding_of(Layout(fsdp=8), tiny("llama", hidden_size=12, head_dim=4), devices)
except UserError as error:
    assert "layout.fsdp 8 does not divide the model's hidden_size 12" in str(error), error
else:
    raise AssertionError
"""


def test_eight_devices_are_divided_as_the_layout_says() -> None:
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-W", "error", "-c", _ON_EIGHT]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", list(COMPOSITIONS))
def test_every_parameter_has_an_axis_for_each_dimension(name: str) -> None:
    for found, parameters in stacks(tiny(name)).items():
        shape = stacked_shape(found, parameters)
        axes = parameter_axes(found, len(shape))
        assert len(axes) == len(shape)
        assert (axes[0] == "layers") == found.startswith("layers.")
        # Every matrix is divided by something, or fsdp would not save the memory that it is for.
        assert len(shape) - found.startswith("layers.") < 2 or "width" in axes


def test_axes_of_a_mesh_are_the_compilers() -> None:
    mesh = sharding_of(Layout(data=1), tiny("llama"), jax.devices()).mesh
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding_of(Layout(data=1), tiny("llama"), jax.devices()).of("rows", "width").spec == PartitionSpec(
        None, None
    )
