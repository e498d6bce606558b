//! Pairs by AMX: tiles of sixteen rows by sixteen outputs (Intel's manual of instruction set extensions, chapter 3).
//!
//! Written as assembly, because the instructions have no stable names in Rust, and each block of it whole, because what
//! tile registers hold is not the compiler's to keep between two. Their configuration is the thread's, and stays: setting
//! it takes as long as a tenth of a block.

#![expect(
    unsafe_code,
    reason = "reads tensors, by instructions that only some processors have"
)]

use super::Block;
#[cfg(target_arch = "x86_64")]
use super::PANELS;

/// Rows of a tile.
#[cfg(target_arch = "x86_64")]
const ROWS: usize = 16;
/// Bytes of a tile's row.
#[cfg(target_arch = "x86_64")]
const ROW_BYTES: usize = 64;

/// Asks for the tiles of these panels that are multiplied four steps from here: more of them are on their way than the
/// processor finds out by itself, a sixth of the time of a decode step.
#[cfg(target_arch = "x86_64")]
macro_rules! fetch_ahead {
    ($($panel:literal),+) => {
        concat!(
            ".irp line, 0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960\n",
            $("prefetcht0 [{", $panel, "} + 4096 + \\line]\n",)+
            ".endr"
        )
    };
}

/// Whether this processor has them and the kernel lets this process use them, which it has to ask for once.
pub(crate) fn is_here() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::sync::OnceLock;

        static IS_HERE: OnceLock<bool> = OnceLock::new();
        *IS_HERE.get_or_init(|| has_tiles() && ask_for_tiles())
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Whether the processor says that it has AMX BF16.
#[cfg(target_arch = "x86_64")]
fn has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE
}

/// Asks Linux for the tiles' state, which threads have from then on (`Documentation/arch/x86/xstate.rst`).
#[cfg(target_arch = "x86_64")]
fn ask_for_tiles() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: the call reads two numbers and changes nothing that this process sees, but for the permission.
        let refused = unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            )
        };
        refused == 0
    }
    #[cfg(not(target_os = "linux"))]
    {
        false
    }
}

/// Where a block's weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Memory, one behind the other.
    Memory,
    /// A cache.
    Cache,
}

/// What a block's products are added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    /// The sums so far.
    Sums,
    Zeros,
}

/// What `ldtilecfg` reads.
#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Rows of each tile, and bytes of such a row.
pub(crate) type Shapes = [(u8, u8); 8];

/// The tile registers of this thread, while they are configured: other libraries of the process use them too.
#[derive(Debug, Default)]
pub(crate) struct Tiles {
    shapes: Option<Shapes>,
}

impl Drop for Tiles {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.shapes.is_some() {
            // SAFETY: they were configured, so they are here.
            unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Tiles {
    /// Gives the tiles these shapes.
    ///
    /// # Safety
    /// What [`is_here`] asks for is here; no tile has more than 16 rows of 64 bytes.
    pub(crate) unsafe fn configure(&mut self, shapes: Shapes) {
        if self.shapes == Some(shapes) {
            return;
        }
        let mut config = TileConfig {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for (tile, (rows, row_bytes)) in shapes.into_iter().enumerate() {
            config.rows[tile] = rows;
            config.row_bytes[tile] = row_bytes.into();
        }
        // SAFETY: the caller's promise: the processor has tiles, and these are a configuration of its only palette.
        unsafe {
            std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly));
        }
        self.shapes = Some(shapes);
    }

    /// Adds the products of a block to its sums.
    ///
    /// # Safety
    /// Rows and weights are there, and so is what [`is_here`] asks for.
    pub(crate) unsafe fn multiply(&mut self, block: &Block) {
        let shape = |rows: usize| (rows as u8, ROW_BYTES as u8);
        let (first, whole) = (shape(block.count.min(ROWS)), shape(ROWS));
        // SAFETY: the caller's promise.
        unsafe {
            if block.panels == PANELS {
                // Tiles 0 to 3 are the sums, 4 the inputs, 5 to 7 weights.
                self.configure([first, first, first, first, first, whole, whole, whole]);
                multiply_one(block);
            } else {
                // 0 and 1 are the sums of the upper rows, 2 and 3 of the lower; 4 and 5 their inputs, 6 and 7 the weights.
                // There is no tile without rows: this one reads what the room has there.
                let second = shape(block.count.saturating_sub(ROWS).max(1));
                let shapes = [first, first, second, second, first, second, whole, whole];
                self.configure(shapes);
                multiply_two(block);
            }
        }
    }
}

/// The sums of two tiles of rows with two panels.
#[cfg(target_arch = "x86_64")]
macro_rules! load_sums {
    () => {
        concat!(
            "tileloadd tmm0, [{sums} + {sums_line}]\n",
            "tileloadd tmm1, [{sums} + {sums_line} + 64]\n",
            "tileloadd tmm2, [{sums_low} + {sums_line}]\n",
            "tileloadd tmm3, [{sums_low} + {sums_line} + 64]"
        )
    };
}

/// No sums so far.
#[cfg(target_arch = "x86_64")]
macro_rules! zero_sums {
    () => {
        "tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3"
    };
}

/// Two tiles of rows with two panels of a block: what it begins with, and what each step does besides.
#[cfg(target_arch = "x86_64")]
macro_rules! multiply_two {
    ($block:expr, $begin:expr $(, $besides:expr)?) => {
        std::arch::asm!(
            $begin,
            "2:",
            "tileloadd tmm6, [{weights} + {line}]",
            "tileloadd tmm4, [{upper} + {stride}]",
            "tileloadd tmm7, [{second} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{lower} + {stride}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            $($besides,)?
            "add {upper}, {step}",
            "add {lower}, {step}",
            "add {weights}, 1024",
            "add {second}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {sums_line}], tmm0",
            "tilestored [{sums} + {sums_line} + 64], tmm1",
            "tilestored [{sums_low} + {sums_line}], tmm2",
            "tilestored [{sums_low} + {sums_line} + 64], tmm3",
            upper = inout(reg) $block.rows => _,
            lower = inout(reg) $block.lower_rows => _,
            weights = inout(reg) $block.weights => _,
            second = inout(reg) $block.weights.add($block.panel_stride) => _,
            steps = inout(reg) $block.steps => _,
            line = in(reg) ROW_BYTES,
            stride = in(reg) 2 * $block.row_stride,
            step = in(reg) 2 * $block.step_stride,
            sums = in(reg) $block.sums,
            sums_low = in(reg) $block.sums.add(ROWS * $block.sums_stride),
            sums_line = in(reg) $block.sums_stride * ROW_BYTES,
            options(nostack),
        )
    };
}

/// Two tiles of rows with two panels.
///
/// # Safety
/// As [`Tiles::multiply`], the tiles configured for the block.
#[cfg(target_arch = "x86_64")]
unsafe fn multiply_two(block: &Block) {
    // SAFETY: each tile is read where the caller has rows and weights, and read and written where there are sums: two of
    // each row.
    unsafe {
        match (block.begin, block.source) {
            (Begin::Sums, Source::Memory) => {
                multiply_two!(block, load_sums!(), fetch_ahead!("weights", "second"));
            }
            (Begin::Sums, Source::Cache) => multiply_two!(block, load_sums!()),
            (Begin::Zeros, Source::Memory) => {
                multiply_two!(block, zero_sums!(), fetch_ahead!("weights", "second"));
            }
            (Begin::Zeros, Source::Cache) => multiply_two!(block, zero_sums!()),
        }
    }
}

/// One tile of rows with all panels of a thread, from memory and added to the sums so far, as calls of few rows are.
///
/// # Safety
/// As [`multiply_two`].
#[cfg(target_arch = "x86_64")]
unsafe fn multiply_one(block: &Block) {
    // SAFETY: as in `multiply_two`, with `PANELS` sums of each row.
    unsafe {
        std::arch::asm!(
            "tileloadd tmm0, [{sums} + {sums_line}]",
            "tileloadd tmm1, [{sums} + {sums_line} + 64]",
            "tileloadd tmm2, [{sums} + {sums_line} + 128]",
            "tileloadd tmm3, [{sums} + {sums_line} + 192]",
            "2:",
            "tileloadd tmm4, [{rows} + {stride}]",
            "tileloadd tmm5, [{weights} + {line}]",
            "tileloadd tmm6, [{second} + {line}]",
            "tileloadd tmm7, [{third} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm5",
            "tileloadd tmm5, [{fourth} + {line}]",
            "tdpbf16ps tmm1, tmm4, tmm6",
            "tdpbf16ps tmm2, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm4, tmm5",
            fetch_ahead!("weights", "second", "third", "fourth"),
            "add {rows}, {step}",
            "add {weights}, 1024",
            "add {second}, 1024",
            "add {third}, 1024",
            "add {fourth}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {sums_line}], tmm0",
            "tilestored [{sums} + {sums_line} + 64], tmm1",
            "tilestored [{sums} + {sums_line} + 128], tmm2",
            "tilestored [{sums} + {sums_line} + 192], tmm3",
            rows = inout(reg) block.rows => _,
            weights = inout(reg) block.weights => _,
            second = inout(reg) block.weights.add(block.panel_stride) => _,
            third = inout(reg) block.weights.add(2 * block.panel_stride) => _,
            fourth = inout(reg) block.weights.add(3 * block.panel_stride) => _,
            steps = inout(reg) block.steps => _,
            line = in(reg) ROW_BYTES,
            stride = in(reg) 2 * block.row_stride,
            step = in(reg) 2 * block.step_stride,
            sums = in(reg) block.sums,
            sums_line = in(reg) block.sums_stride * ROW_BYTES,
            options(nostack),
        );
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Tiles {
    /// There is no such processor.
    pub(crate) unsafe fn multiply(&mut self, _block: &Block) {}
}
