"""The accelerators we know by name: one line each, next to its like.

Columns: key, the vendor's name as the driver prints it, memory on the label (GB), MiB that
nvidia-smi (rocm-smi, macOS) reports, MiB that CUDA shows free on an idle card, datasheet bandwidth
in GB/s, dense 16-bit matrix TFLOP/s with fp32 accumulation and without sparsity.

The fifth column is what a process can allocate before a context of its own: a driver keeps 300 to
900 MiB of a card to itself, newer ones more. The cards in REPORTED_FREE stay at or below a total
that CUDA reported on such a card; the others are estimates that wait for a measurement.
Data-center cards have ECC on, workstation cards off: turning it on takes 1/16 of a card with GDDR
memory.
"""

from __future__ import annotations

from oomproof.hardware.spec import DeviceKind

Row = tuple[str, str, int, int, int, float, float]
Group = tuple[DeviceKind, str, tuple[int, int] | None, str, tuple[Row, ...]]

REPORTED_FREE = frozenset(
    (
        "A100-80GB",  # 81,050 MiB
        "B200",  # 178.35 GiB
        "RTX 3070",  # 7.78 GiB
        "RTX 3080 10GB",  # 9.78 GiB
        "RTX 4090",  # 23.61 to 23.68 GiB
        "RTX 5060 Ti 16GB",  # 15,816 MiB
        "RTX 5090",  # 31.36 GiB
    )
)
"""Entries whose free memory was held against a public report of what CUDA shows."""

UNIFIED = frozenset(("GB10",))
"""Non-Apple entries that share their memory with the processor."""

# fmt: off
GROUPS: tuple[Group, ...] = (
    ("cuda", "pascal", (6, 0), "Tesla P100 datasheet; fp16 without tensor cores", (
        ("P100-16GB", "Tesla P100-PCIE-16GB", 16, 16384, 16260, 732, 18.7),
    )),
    ("cuda", "pascal", (6, 1), "GTX 1080 Ti and Tesla P40 datasheets; fp32 rate, fp16 is slower", (
        ("GTX 1080 Ti", "NVIDIA GeForce GTX 1080 Ti", 11, 11264, 11160, 484, 11.3),
        ("P40", "Tesla P40", 24, 23040, 22900, 346, 11.8),
    )),
    ("cuda", "volta", (7, 0), "V100 datasheet (SXM2)", (
        ("V100-16GB", "Tesla V100-SXM2-16GB", 16, 16384, 16140, 900, 125),
        ("V100-32GB", "Tesla V100-SXM2-32GB", 32, 32768, 32490, 900, 125),
    )),
    ("cuda", "turing", (7, 5), "T4 datasheet, Turing GPU architecture whitepaper", (
        ("T4", "Tesla T4", 16, 15360, 14900, 300, 65),
        ("RTX 2080 Ti", "NVIDIA GeForce RTX 2080 Ti", 11, 11264, 10820, 616, 53.8),
        ("TITAN RTX", "NVIDIA TITAN RTX", 24, 24576, 24060, 672, 130.5),
    )),
    ("cuda", "ampere", (8, 0), "A100 and A30 datasheets", (
        ("A100-40GB", "NVIDIA A100-SXM4-40GB", 40, 40960, 40330, 1555, 312),
        ("A100-80GB", "NVIDIA A100-SXM4-80GB", 80, 81920, 81030, 2039, 312),
        ("A100-PCIe-40GB", "NVIDIA A100-PCIE-40GB", 40, 40960, 40330, 1555, 312),
        ("A100-PCIe-80GB", "NVIDIA A100 80GB PCIe", 80, 81920, 81030, 1935, 312),
        ("A30", "NVIDIA A30", 24, 24576, 24060, 933, 165),
    )),
    ("cuda", "ampere", (8, 6), "A10, A16, A2, A40 and RTX A series datasheets, GA102 whitepaper", (
        ("A10", "NVIDIA A10", 24, 23028, 22560, 600, 125),
        ("A10G", "NVIDIA A10G", 24, 23028, 22560, 600, 70),
        ("A16", "NVIDIA A16", 16, 15356, 14700, 200, 17.9),
        ("A2", "NVIDIA A2", 16, 15356, 14700, 200, 18),
        ("A40", "NVIDIA A40", 48, 46068, 45400, 696, 149.7),
        ("RTX A4000", "NVIDIA RTX A4000", 16, 16376, 15930, 448, 76.7),
        ("RTX A4500", "NVIDIA RTX A4500", 20, 20470, 19980, 640, 94.6),
        ("RTX A5000", "NVIDIA RTX A5000", 24, 24564, 24080, 768, 111.1),
        ("RTX A6000", "NVIDIA RTX A6000", 48, 49140, 48500, 768, 154.8),
        ("RTX 3060", "NVIDIA GeForce RTX 3060", 12, 12288, 11900, 360, 25.5),
        ("RTX 3070", "NVIDIA GeForce RTX 3070", 8, 8192, 7830, 448, 40.6),
        ("RTX 3080 10GB", "NVIDIA GeForce RTX 3080", 10, 10240, 9860, 760, 59.5),
        ("RTX 3080 12GB", "NVIDIA GeForce RTX 3080", 12, 12288, 11880, 912, 61.3),
        ("RTX 3080 Ti", "NVIDIA GeForce RTX 3080 Ti", 12, 12288, 11880, 912, 68.2),
        ("RTX 3090", "NVIDIA GeForce RTX 3090", 24, 24576, 24110, 936, 71),
        ("RTX 3090 Ti", "NVIDIA GeForce RTX 3090 Ti", 24, 24564, 24080, 1008, 80),
    )),
    ("cuda", "ada", (8, 9), "L4, L40, L40S and RTX Ada datasheets, Ada whitepaper", (
        ("L4", "NVIDIA L4", 24, 23034, 22550, 300, 121),
        ("L40", "NVIDIA L40", 48, 46068, 45440, 864, 181),
        ("L40S", "NVIDIA L40S", 48, 46068, 45440, 864, 362),
        ("RTX 4000 Ada", "NVIDIA RTX 4000 Ada Generation", 20, 20475, 19980, 360, 81.9),
        ("RTX 4500 Ada", "NVIDIA RTX 4500 Ada Generation", 24, 24570, 24000, 432, 158.5),
        ("RTX 5000 Ada", "NVIDIA RTX 5000 Ada Generation", 32, 32760, 32150, 576, 261.1),
        ("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation", 48, 49140, 48450, 960, 364.2),
        ("RTX 4060 Ti 8GB", "NVIDIA GeForce RTX 4060 Ti", 8, 8188, 7800, 288, 44.1),
        ("RTX 4060 Ti 16GB", "NVIDIA GeForce RTX 4060 Ti", 16, 16380, 15920, 288, 44.1),
        ("RTX 4070", "NVIDIA GeForce RTX 4070", 12, 12282, 11860, 504, 58.3),
        ("RTX 4070 SUPER", "NVIDIA GeForce RTX 4070 SUPER", 12, 12282, 11860, 504, 70.9),
        ("RTX 4070 Ti", "NVIDIA GeForce RTX 4070 Ti", 12, 12282, 11860, 504, 80.2),
        ("RTX 4070 Ti SUPER", "NVIDIA GeForce RTX 4070 Ti SUPER", 16, 16376, 15910, 672, 88.2),
        ("RTX 4080", "NVIDIA GeForce RTX 4080", 16, 16376, 15910, 716.8, 97.5),
        ("RTX 4080 SUPER", "NVIDIA GeForce RTX 4080 SUPER", 16, 16376, 15910, 736, 104.4),
        ("RTX 4090", "NVIDIA GeForce RTX 4090", 24, 24564, 24070, 1008, 165.2),
        ("RTX 4090 Laptop", "NVIDIA GeForce RTX 4090 Laptop GPU", 16, 16376, 15910, 576, 85.8),
    )),
    ("cuda", "hopper", (9, 0), "H100, H200 and GH200 datasheets", (
        ("H100-80GB", "NVIDIA H100 80GB HBM3", 80, 81559, 80990, 3350, 989.4),
        ("H100 PCIe", "NVIDIA H100 PCIe", 80, 81559, 80990, 2000, 756.5),
        ("H100 NVL", "NVIDIA H100 NVL", 94, 95830, 95240, 3900, 835.5),
        ("H200", "NVIDIA H200", 141, 143771, 143070, 4800, 989.4),
        ("H200 NVL", "NVIDIA H200 NVL", 141, 143771, 143070, 4800, 835.5),
        ("GH200-96GB", "NVIDIA GH200 480GB", 96, 97871, 96760, 4000, 989.4),
    )),
    ("cuda", "blackwell", (10, 0), "HGX B200 and GB200 NVL72 datasheets", (
        ("B200", "NVIDIA B200", 180, 183359, 182600, 7700, 2250),
        ("GB200", "NVIDIA GB200", 186, 189471, 187900, 8000, 2500),
    )),
    ("cuda", "blackwell", (10, 3), "HGX B300 and GB300 NVL72 datasheets", (
        ("B300", "NVIDIA B300 SXM6 AC", 288, 275040, 273400, 8000, 2250),
        ("GB300", "NVIDIA GB300", 288, 284208, 282000, 8000, 2500),
    )),
    ("cuda", "blackwell", (12, 0), "RTX Blackwell and RTX PRO Blackwell whitepapers", (
        ("RTX PRO 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
         96, 97887, 97200, 1792, 503.8),
        ("RTX PRO 6000 Max-Q", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
         96, 97887, 97200, 1792, 438.9),
        ("RTX PRO 6000 Server", "NVIDIA RTX PRO 6000 Blackwell Server Edition",
         96, 97887, 97200, 1597, 503.8),
        ("RTX 5060 Ti 8GB", "NVIDIA GeForce RTX 5060 Ti", 8, 8151, 7660, 448, 47.4),
        ("RTX 5060 Ti 16GB", "NVIDIA GeForce RTX 5060 Ti", 16, 16311, 15800, 448, 47.4),
        ("RTX 5070", "NVIDIA GeForce RTX 5070", 12, 12227, 11740, 672, 61.7),
        ("RTX 5070 Ti", "NVIDIA GeForce RTX 5070 Ti", 16, 16303, 15800, 896, 87.9),
        ("RTX 5080", "NVIDIA GeForce RTX 5080", 16, 16303, 15800, 960, 112.6),
        ("RTX 5090", "NVIDIA GeForce RTX 5090", 32, 32607, 32080, 1792, 209.5),
        ("RTX 5090 Laptop", "NVIDIA GeForce RTX 5090 Laptop GPU", 24, 24463, 23900, 896, 114),
    )),
    ("cuda", "blackwell", (12, 1), "DGX Spark datasheet; 16-bit rate from its 1 PFLOP sparse FP4", (
        ("GB10", "NVIDIA GB10", 128, 122548, 114688, 273, 125),
    )),
    ("rocm", "cdna2", None, "AMD Instinct MI200 datasheets; MI250X per GCD, as ROCm shows it", (
        ("MI210", "AMD Instinct MI210", 64, 65520, 65200, 1638, 181),
        ("MI250X", "AMD Instinct MI250X", 64, 65520, 65200, 1638, 191.5),
    )),
    ("rocm", "cdna3", None, "AMD Instinct MI300X and MI325X datasheets", (
        ("MI300X", "AMD Instinct MI300X", 192, 196592, 196000, 5300, 1307.4),
        ("MI325X", "AMD Instinct MI325X", 256, 262128, 261400, 6000, 1307.4),
    )),
    ("rocm", "cdna4", None, "AMD Instinct MI355X datasheet", (
        ("MI355X", "AMD Instinct MI355X", 288, 294896, 294000, 8000, 2516.6),
    )),
    ("rocm", "rdna3", None, "AMD Radeon RX 7900 XTX and PRO W7900 specifications", (
        ("RX 7900 XTX", "AMD Radeon RX 7900 XTX", 24, 24560, 24300, 960, 122.8),
        ("PRO W7900", "AMD Radeon PRO W7900", 48, 49136, 48800, 864, 122.6),
    )),
)
# fmt: on

FURTHER_SPELLINGS: dict[str, tuple[str, ...]] = {
    "P100-16GB": ("P100", "Tesla P100-SXM2-16GB"),
    "V100-16GB": ("V100", "Tesla V100-PCIE-16GB"),
    "V100-32GB": ("V100", "Tesla V100-PCIE-32GB"),
    "A100-40GB": ("A100", "A100 SXM 40GB"),
    "A100-80GB": ("A100", "A100 SXM 80GB"),
    "A100-PCIe-40GB": ("A100 PCIe",),
    "A100-PCIe-80GB": ("A100 PCIe",),
    "RTX 6000 Ada": ("RTX 6000",),
    "H100-80GB": ("H100", "H100 SXM", "H100 SXM 80GB", "H100 SXM5"),
    "H100 NVL": ("H100-94GB",),
    "H200": ("H200 SXM",),
    "GH200-96GB": ("GH200",),
    "RTX PRO 6000": ("RTX 6000", "RTX PRO 6000 Blackwell"),
    "GB10": ("DGX Spark", "GB10 DGX Spark"),
    "MI250X": ("MI250X GCD",),
    "PRO W7900": ("W7900",),
}
"""Key → what else people and drivers call it; a spelling of several entries is ambiguous."""

APPLE_SOURCE = "Apple newsroom; GPU rate (fp32, as fp16) only where Apple published it"
APPLE: tuple[tuple[str, tuple[int, ...], float, float | None], ...] = (
    ("M1 Max", (32, 64), 400, 10.4),
    ("M1 Ultra", (64, 128), 800, 21),
    ("M2 Max", (32, 64, 96), 400, 13.6),
    ("M2 Ultra", (64, 128, 192), 800, 27.2),
    ("M3 Max", (64, 128), 400, None),
    ("M3 Ultra", (96, 256, 512), 819, None),
    ("M4 Pro", (24, 48, 64), 273, None),
    ("M4 Max", (64, 128), 546, None),
)
"""Chip, memory sizes in GiB that have this bandwidth, GB/s, TFLOP/s."""
