//! Blocks as tensors of bytes that numpy, torch and others take without a copy: `DLPack`'s C structures.
//!
//! Layouts and flags are those of `dlpack.h`, version 1.0, and of the structure without a version that came before it.
//! Whoever takes such a structure calls its deleter, from any thread, when it is done; that ends its hold on the block.

#![expect(
    unsafe_code,
    reason = "hands out structures that C code frees through a pointer in them"
)]

use std::{ffi::c_void, ptr::NonNull, sync::Arc};

use crate::{pool::BlockView, tier::Tier};

const VERSION: Version = Version { major: 1, minor: 0 };
/// `DLPACK_FLAG_BITMASK_READ_ONLY`.
const READ_ONLY: u64 = 1;
/// `kDLCPU`: also of memory that cards reach, as long as processors do.
const CPU: i32 = 1;
/// `kDLCUDA`.
const CUDA: i32 = 2;
/// `kDLUInt`.
const UNSIGNED: u8 = 1;

#[repr(C)]
struct Version {
    major: u32,
    minor: u32,
}

/// `DLTensor`.
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    num_dimensions: i32,
    type_code: u8,
    type_bits: u8,
    type_lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLManagedTensor`.
#[repr(C)]
struct Plain {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
struct Versioned {
    version: Version,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
    flags: u64,
    tensor: Tensor,
}

/// What the context of either structure points at.
struct Context {
    shape: [i64; 1],
    strides: [i64; 1],
    #[expect(dead_code, reason = "ends its hold by being dropped")]
    view: Arc<BlockView>,
}

/// A tensor for `PyCapsule_New`; freed by [`discard`](Self::discard) where nobody has taken it, else by its taker.
#[derive(Debug)]
pub enum Managed {
    /// `DLManagedTensorVersioned`, in a capsule of the name `dltensor_versioned`.
    Versioned(NonNull<c_void>),
    /// `DLManagedTensor`, in a capsule of the name `dltensor`. It cannot say that it must not be written.
    Plain(NonNull<c_void>),
}

/// The device of a tier, as `DLPack` calls it: its type and its number.
pub const fn device_of(tier: Tier) -> (i32, i32) {
    match tier.device() {
        None => (CPU, 0),
        Some(device) => (CUDA, device as i32),
    }
}

/// A block as a tensor of bytes. `None` where the structure without a version is asked for and the view may not write.
pub fn export(view: Arc<BlockView>, is_versioned: bool) -> Option<Managed> {
    let flags = if view.is_writable() { 0 } else { READ_ONLY };
    if is_versioned {
        let (tensor, context) = tensor_of(view);
        let managed = Box::new(Versioned {
            version: VERSION,
            context,
            deleter: Some(delete_versioned),
            flags,
            tensor,
        });
        return NonNull::new(Box::into_raw(managed).cast()).map(Managed::Versioned);
    }
    if flags == READ_ONLY {
        return None;
    }
    let (tensor, context) = tensor_of(view);
    let managed = Box::new(Plain {
        tensor,
        context,
        deleter: Some(delete_plain),
    });
    NonNull::new(Box::into_raw(managed).cast()).map(Managed::Plain)
}

fn tensor_of(view: Arc<BlockView>) -> (Tensor, *mut c_void) {
    let data = view.as_ptr().cast();
    let (device_type, device_id) = device_of(view.tier());
    let context = Box::into_raw(Box::new(Context {
        shape: [view.len() as i64],
        strides: [1],
        view,
    }));
    // SAFETY: `context` is a box of ours that nobody else knows of yet.
    let (shape, strides) = unsafe { (&raw mut (*context).shape, &raw mut (*context).strides) };
    let tensor = Tensor {
        data,
        device_type,
        device_id,
        num_dimensions: 1,
        type_code: UNSIGNED,
        type_bits: 8,
        type_lanes: 1,
        shape: shape.cast(),
        strides: strides.cast(),
        byte_offset: 0,
    };
    (tensor, context.cast())
}

/// # Safety
/// `managed` came from [`export`] as a versioned structure and was not deleted yet.
unsafe extern "C" fn delete_versioned(managed: *mut Versioned) {
    // SAFETY: by the contract above both pointers are boxes of ours, and nobody uses them any more.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Box::from_raw(managed.context.cast::<Context>()));
    }
}

/// # Safety
/// `managed` came from [`export`] as a plain structure and was not deleted yet.
unsafe extern "C" fn delete_plain(managed: *mut Plain) {
    // SAFETY: by the contract above both pointers are boxes of ours, and nobody uses them any more.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Box::from_raw(managed.context.cast::<Context>()));
    }
}

impl Managed {
    /// Frees a structure that nobody has taken, as a taker would.
    ///
    /// # Safety
    /// It came from [`export`], whoever holds the pointer has not called the deleter, and nobody uses it afterwards.
    pub unsafe fn discard(self) {
        // SAFETY: the caller says that the structure is whole and that this is the only call.
        unsafe {
            match self {
                Self::Versioned(managed) => delete_versioned(managed.as_ptr().cast()),
                Self::Plain(managed) => delete_plain(managed.as_ptr().cast()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Pool, PoolConfig, Slab, SlabId};

    fn view(is_sealed: bool) -> (Arc<Pool>, Arc<BlockView>) {
        let config = PoolConfig {
            block_bytes: 4096,
            slab_bytes: 2 << 20,
            huge_pages: false,
            ..PoolConfig::default()
        };
        let pool = Pool::new(config).unwrap();
        let slab = Slab::create(SlabId(0), &config.slab()).unwrap();
        pool.add_slab(Arc::new(slab)).unwrap();
        let set = pool.allocate(1).unwrap();
        set.write(0, 0, &[7; 4096]).unwrap();
        if is_sealed {
            set.seal().unwrap();
        }
        let view = pool.view(set.handle(0).unwrap()).unwrap();
        // The set is freed here: only the view keeps the block.
        (pool, Arc::new(view))
    }

    #[test]
    fn a_taker_reads_the_block_and_its_deleter_ends_the_hold() {
        let (pool, held) = view(true);
        let Some(Managed::Versioned(managed)) = export(held, true) else {
            panic!("a versioned tensor was asked for");
        };
        let managed = managed.cast::<Versioned>().as_ptr();
        // SAFETY: the structure is as `export` made it, and the block is held until the deleter is called.
        unsafe {
            assert_eq!(((*managed).version.major, (*managed).flags), (1, READ_ONLY));
            let tensor = &(*managed).tensor;
            assert_eq!((*tensor.shape, *tensor.strides), (4096, 1));
            assert_eq!(*tensor.data.cast::<u8>().add(4095), 7);
            assert_eq!(pool.stats().allocatable, pool.stats().num_blocks - 1);
            let delete = (*managed).deleter.unwrap();
            delete(managed);
        }
        assert_eq!(pool.stats().allocatable, pool.stats().num_blocks);
    }

    #[test]
    fn what_may_not_be_written_is_not_exported_without_a_version() {
        assert!(export(view(true).1, false).is_none());
        let (pool, held) = view(false);
        let exported = export(Arc::clone(&held), false).unwrap();
        assert!(matches!(exported, Managed::Plain(_)));
        drop(held);
        assert_eq!(pool.stats().allocatable, pool.stats().num_blocks - 1);
        // SAFETY: nobody has taken it.
        unsafe { exported.discard() };
        assert_eq!(pool.stats().allocatable, pool.stats().num_blocks);
    }
}
