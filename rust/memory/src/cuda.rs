//! Memory of NVIDIA devices, and host memory that they reach: through the driver's library alone, without a toolkit.
//!
//! All calls return when the bytes are where they belong, so that a transport may read them at once. They order
//! nothing against other work on the device: whoever fills a block there, or reads it, waits for its own streams.
//!
//! Reading order: this module finds the library and words its refusals, [`ffi`] calls it (all `unsafe` code is there).

mod ffi;

use std::{env, sync::Arc};

use self::ffi::Refusal;
pub(crate) use self::ffi::{Context, DeviceMemory, Registration};
use crate::{error::MemoryError, tier::Tier};

/// The variable that names the driver's library, by full path. Where it is set, nothing else is tried.
pub const LIBRARY_VARIABLE: &str = "ORCHESTRA_CUDA_LIB";
/// What the driver is called on the system's own search path.
const LIBRARY: &str = "libcuda.so.1";
/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: i32 = 2;

/// The context that the process shares on the device of a tier; on the first one for pinned memory, which all devices
/// then reach. Nothing is chosen in its place: the error says what is missing.
pub(crate) fn open(tier: Tier) -> Result<Arc<Context>, MemoryError> {
    let library = env::var(LIBRARY_VARIABLE).unwrap_or_else(|_| LIBRARY.to_owned());
    let opened = Context::open(&library, tier.device().unwrap_or(0));
    opened.map(Arc::new).map_err(|refusal| {
        let reason = match refusal {
            Refusal::Library(reason) => format!("{library}: {reason}"),
            Refusal::Call { action, name, code } => format!("{action}: {name} ({code})"),
        };
        MemoryError::TierUnavailable { tier, reason }
    })
}

/// Takes memory of a device. All of it is zero.
pub(crate) fn allocate(context: Arc<Context>, len: u64) -> Result<DeviceMemory, MemoryError> {
    let device = context.device();
    DeviceMemory::allocate(context, len).map_err(|refusal| failed(device, len, refusal))
}

/// What a device or the driver has refused, where `need` bytes were asked for.
fn failed(device: u32, need: u64, refusal: Refusal) -> MemoryError {
    match refusal {
        Refusal::Call { code, .. } if code == OUT_OF_MEMORY => {
            MemoryError::DeviceExhausted { device, need }
        }
        Refusal::Call { action, name, code } => MemoryError::Device {
            device,
            action,
            name,
            code,
        },
        Refusal::Library(name) => MemoryError::Device {
            device,
            action: "load the driver",
            name,
            code: 0,
        },
    }
}
