"""Reads a machine file such as `rngd.toml` into a frozen object with one typed attribute a parameter."""

from __future__ import annotations

import hashlib
import tomllib
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Mode = Literal["documented", "silicon"]
# What HBM and PCIe do by their own clocks, in units of the tensor clock.
_PER_SECOND = (
    "hbm_channel_bytes_per_cycle", "dma_hbm_bytes_per_cycle", "pcie_bytes_per_cycle", "pcie_peer_bytes_per_cycle",
)  # fmt: skip
_SECONDS = ("hbm_row_switch_cycles", "pcie_latency_cycles")


class Parameter(BaseModel):
    """One number of the machine with where it comes from.

    value holds in documented mode; silicon, if given, replaces it in silicon mode. range: what the sources leave open
    for the number of silicon mode; measured and chosen numbers have one, documented ones are exact.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: int | float
    unit: str
    source: str
    confidence: Literal["documented", "measured", "chosen"]
    why: str
    silicon: int | float | None = None
    range: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _known(self) -> Parameter:
        uncertain = self.silicon is not None or self.confidence != "documented"
        if uncertain != (self.range is not None):
            raise ValueError("a measured or chosen number needs a range, a documented one has none")
        if self.range is not None and not self.range[0] <= self.in_mode("silicon") <= self.range[1]:
            raise ValueError(f"{self.in_mode('silicon')} is outside its range {self.range}")
        return self

    def in_mode(self, mode: Mode) -> int | float:
        """The number to use in `mode`."""
        return self.silicon if mode == "silicon" and self.silicon is not None else self.value


class Machine(BaseModel):
    """A machine in one timing mode. Units and sources of every attribute stand in `parameters`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    mode: Mode
    parameters: dict[str, Parameter] = Field(repr=False)

    clusters_per_chip: int
    pes_per_chip: int
    slices_per_pe: int
    slices_per_cluster: int
    slices_per_dmn: int
    dma_engines_per_pe: int
    clock_hz: int
    tick_hz: int
    clock_scale: float
    host_step_us: float

    hbm_bytes: int
    hbm_usable_bytes: int
    hbm_channels: int
    hbm_channel_bytes_per_cycle: float
    hbm_line_bytes: int
    hbm_row_switch_cycles: float
    hbm_efficiency: float
    hbm_reorders: int
    hbm_unaligned_write_factor: float
    hbm_write_granule_bytes: int
    hbm_map_alignment: int
    dm_slice_bytes: int
    dm_slice_stride: int
    dm_banks: int
    dm_bank_bytes: int
    dm_alignment: int
    dm_starvation_hits: int
    dmn_bytes_per_cycle: int
    dmn_window_bytes: int
    trf_bytes_per_slice: int
    trf_lanes: int
    trf_halves: int
    vrf_bytes: int
    vrf_stash_bytes: int

    flit_bytes: int
    fetch_main_bytes: int
    fetch_sub_bytes: int
    commit_sub_bytes: int
    packet_multiple_bytes: int
    lookup_keys_per_cycle: float
    lookup_load_cycles: int
    max_loops: int
    max_loop_size: int
    max_stride_bits: int
    commit_stride_bytes: int

    switch_fill_cycles_per_hop: int
    switch_configuration_cycles: int

    contraction_packet_bytes: int
    accumulators: int
    interleaved_slots: int
    sequential_slots: int
    max_columns: int
    contraction_fill_cycles: int

    vector_wide: int
    vector_narrow: int
    vector_alu_cycles: int
    reduce_slots: int
    vector_immediates: int

    pass_issue_cycles: int
    cluster_sync_cycles: int
    launch_skew_cycles: int

    dma_startup_cycles: int
    dma_descriptor_cycles: int
    dma_request_bytes: int
    dma_packet_max_bytes: int
    dma_alignment_bytes: int
    dma_engine_bytes_per_cycle: int
    dma_hbm_bytes_per_cycle: float
    dma_dm_misaligned_factor: float
    pcie_bytes_per_cycle: float
    pcie_peer_bytes_per_cycle: float
    pcie_latency_cycles: float
    dm_cross_cluster_bytes_per_cycle: int
    registers: int

    notify_issue_cycles: int
    notify_cluster_cycles: int
    semaphores: int

    power_idle_watts: float
    power_pe_watts: float
    power_card_watts: float

    @property
    def hbm_bytes_per_cycle(self) -> float:
        """Peak of all channels together."""
        return float(self.hbm_channels * self.hbm_channel_bytes_per_cycle)

    @property
    def slices_per_chip(self) -> int:
        """All slices of a chip."""
        return self.slices_per_pe * self.pes_per_chip

    @property
    def pes_per_cluster(self) -> int:
        """PEs of a cluster; they share a switch ring."""
        return self.pes_per_chip // self.clusters_per_chip

    @property
    def dm_port_bytes_per_cycle(self) -> float:
        """Port of a PE's data memory: all its data-memory networks together, reads and writes share it."""
        return float(self.dmn_bytes_per_cycle * self.slices_per_pe // self.slices_per_dmn)

    @property
    def trf_lane_bytes(self) -> int:
        """TRF bytes of a lane when all lanes are in use."""
        return self.trf_bytes_per_slice // self.trf_lanes

    @property
    def seconds_per_cycle(self) -> float:
        """Duration of a tensor-clock cycle at the configured operating point."""
        return 1.0 / (self.clock_hz * self.clock_scale)

    def in_mode(self, mode: Mode) -> Machine:
        """The same machine in another timing mode."""
        return self if mode == self.mode else _build(self.name, mode, self.parameters)

    def at_clock(self, scale: float) -> Machine:
        """The same machine with the tensor clock at `scale` times its value: memories and links keep their speed in
        seconds, so that they move more bytes a cycle of a slower clock."""
        factor = scale / self.clock_scale
        values = {name: getattr(self, name) / factor for name in _PER_SECOND}
        values |= {name: getattr(self, name) * factor for name in _SECONDS}
        values["dma_hbm_bytes_per_cycle"] = min(values["dma_hbm_bytes_per_cycle"], self.dma_engine_bytes_per_cycle)
        parameters = {**self.parameters}
        for name, value in (values | {"clock_scale": scale}).items():  # the digest must tell the machines apart
            parameters[name] = parameters[name].model_copy(update={"value": value, "silicon": None})
        return self.model_copy(update=values | {"clock_scale": scale, "parameters": parameters})

    def digest(self) -> str:
        """Hash of every number: changes when the description does (cache keys, artifacts)."""
        numbers = sorted((k, p.value, p.silicon) for k, p in self.parameters.items())
        return hashlib.sha256(repr((self.name, numbers)).encode()).hexdigest()


def _build(name: str, mode: Mode, parameters: dict[str, Parameter]) -> Machine:
    values: dict[str, Any] = {key: p.in_mode(mode) for key, p in parameters.items()}
    return Machine(name=name, mode=mode, parameters=parameters, **values)


@lru_cache(maxsize=16)
def load_machine(name: str = "rngd", mode: Mode = "documented") -> Machine:
    """Load a machine by name (a file of this package) or by path of a `.toml` file.

    Raises FileNotFoundError if there is none, pydantic.ValidationError if a parameter is missing, misspelled or lacks
    its unit, source or reason.
    """
    if name.endswith(".toml"):
        text = Path(name).read_text(encoding="utf-8")
    else:
        file = resources.files("backend_rngd.machine") / f"{name}.toml"
        if not file.is_file():
            raise FileNotFoundError(f"no machine named {name!r}: there is no {name}.toml in backend_rngd/machine")
        text = file.read_text(encoding="utf-8")
    parameters = {key: Parameter.model_validate(entry) for key, entry in tomllib.loads(text).items()}
    return _build(Path(name).stem, mode, parameters)
