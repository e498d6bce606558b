//! Pairs by AMX: tiles of sixteen rows by sixteen outputs (Intel's manual of instruction set extensions, chapter 3).
//!
//! Written as assembly, because the instructions have no stable names in Rust, and each block of it whole, because what
//! tile registers hold is not the compiler's to keep between two. A block configures the tiles it uses, and releases
//! them: other libraries of the process use them too.

#![expect(
    unsafe_code,
    reason = "reads tensors, by instructions that only some processors have"
)]

use super::{Block, HEIGHT, WIDTH};

/// Rows of a tile.
#[cfg(target_arch = "x86_64")]
const ROWS: usize = 16;
/// Bytes of a tile's row.
#[cfg(target_arch = "x86_64")]
const ROW_BYTES: usize = 64;

/// Whether this processor has them and the kernel lets this process use them, which it has to ask for once.
pub(super) fn is_here() -> bool {
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

#[cfg(target_arch = "x86_64")]
impl TileConfig {
    /// Tiles 0 and 1 are the sums of the upper rows, 2 and 3 of the lower; 4 and 5 their inputs, 6 and 7 the weights.
    fn of(upper: usize, lower: usize) -> Self {
        let (upper, lower) = (upper as u8, lower as u8);
        let mut rows = [0; 16];
        rows[..8].copy_from_slice(&[upper, upper, lower, lower, upper, lower, 16, 16]);
        let row_bytes = rows.map(|rows| if rows > 0 { ROW_BYTES as u16 } else { 0 });
        Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes,
            rows,
        }
    }
}

/// # Safety
/// Rows and weights are there, and so is what [`is_here`] asks for.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn multiply(block: &Block, sums: &mut [[f32; WIDTH]; HEIGHT]) {
    // SAFETY: the caller's promise.
    unsafe {
        if block.count > ROWS {
            multiply_two(block, sums);
        } else {
            multiply_one(block, sums);
        }
    }
}

/// Two tiles of rows.
#[cfg(target_arch = "x86_64")]
unsafe fn multiply_two(block: &Block, sums: &mut [[f32; WIDTH]; HEIGHT]) {
    let config = TileConfig::of(ROWS, block.count - ROWS);
    let panel_bytes = block.depth * ROW_BYTES / 2;
    // SAFETY: each tile is read where the caller has rows and weights, and written where `sums` has room: 16 rows of each
    // are `WIDTH` numbers apart.
    unsafe {
        std::arch::asm!(
            "ldtilecfg [{config}]",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm6, [{weights} + {line}]",
            "tileloadd tmm4, [{upper} + {stride}]",
            "tileloadd tmm7, [{second} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{lower} + {stride}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {upper}, 64",
            "add {lower}, 64",
            "add {weights}, 1024",
            "add {second}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {sums_line}], tmm0",
            "tilestored [{sums} + {sums_line} + 64], tmm1",
            "tilestored [{sums_low} + {sums_line}], tmm2",
            "tilestored [{sums_low} + {sums_line} + 64], tmm3",
            "tilerelease",
            config = in(reg) &raw const config,
            upper = inout(reg) block.rows => _,
            lower = inout(reg) block.rows.add(ROWS * block.stride) => _,
            weights = inout(reg) block.weights => _,
            second = inout(reg) block.weights.byte_add(panel_bytes) => _,
            steps = inout(reg) block.depth / super::DEPTH => _,
            line = in(reg) ROW_BYTES,
            stride = in(reg) 2 * block.stride,
            sums = in(reg) sums.as_mut_ptr(),
            sums_low = in(reg) sums.as_mut_ptr().add(ROWS),
            sums_line = in(reg) size_of::<[f32; WIDTH]>(),
            options(nostack),
        );
    }
}

/// One tile of rows.
#[cfg(target_arch = "x86_64")]
unsafe fn multiply_one(block: &Block, sums: &mut [[f32; WIDTH]; HEIGHT]) {
    let config = TileConfig::of(block.count, 0);
    let panel_bytes = block.depth * ROW_BYTES / 2;
    // SAFETY: as in `multiply_two`.
    unsafe {
        std::arch::asm!(
            "ldtilecfg [{config}]",
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{upper} + {stride}]",
            "tileloadd tmm6, [{weights} + {line}]",
            "tileloadd tmm7, [{second} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {upper}, 64",
            "add {weights}, 1024",
            "add {second}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {sums_line}], tmm0",
            "tilestored [{sums} + {sums_line} + 64], tmm1",
            "tilerelease",
            config = in(reg) &raw const config,
            upper = inout(reg) block.rows => _,
            weights = inout(reg) block.weights => _,
            second = inout(reg) block.weights.byte_add(panel_bytes) => _,
            steps = inout(reg) block.depth / super::DEPTH => _,
            line = in(reg) ROW_BYTES,
            stride = in(reg) 2 * block.stride,
            sums = in(reg) sums.as_mut_ptr(),
            sums_line = in(reg) size_of::<[f32; WIDTH]>(),
            options(nostack),
        );
    }
}

/// There is no such processor.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn multiply(_block: &Block, _sums: &mut [[f32; WIDTH]; HEIGHT]) {}
