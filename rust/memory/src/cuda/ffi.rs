//! The part of the driver's C interface that we use, and safe handles on it. All `unsafe` code of this module.
//!
//! The functions are those of `cuda.h` under the names that the library exports, of the version that has 64-bit sizes. A
//! missing function is an error when the library is loaded, not when it is called.

#![expect(unsafe_code, reason = "calls a C library")]

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    mem::ManuallyDrop,
    ptr::{self, NonNull},
    sync::Arc,
};

use libloading::Library;

use super::failed;
use crate::error::{MemoryError, in_full};

type Status = c_int;
/// `CUdevice`.
type Device = c_int;
/// `CUcontext`.
type Handle = *mut c_void;
/// `CUdeviceptr`.
type Address = u64;

const SUCCESS: Status = 0;
/// `CU_MEMHOSTREGISTER_PORTABLE`: for the contexts of all devices.
const PORTABLE: c_uint = 1;

macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*);)*) => {
        /// The functions, resolved once for each context.
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> Status,)*
        }

        impl Functions {
            fn resolve(library: &Library) -> Result<Self, String> {
                Ok(Self {
                    $($field: {
                        let symbol = concat!($symbol, "\0");
                        // SAFETY: the type is that of the function of this name in the driver's header.
                        let found = unsafe {
                            library.get::<unsafe extern "C" fn($($argument),*) -> Status>(symbol.as_bytes())
                        };
                        *found.map_err(|error| in_full(&error))?
                    },)*
                })
            }
        }
    };
}

functions! {
    init = "cuInit": fn(c_uint);
    error_name = "cuGetErrorName": fn(Status, *mut *const c_char);
    device = "cuDeviceGet": fn(*mut Device, c_int);
    retain = "cuDevicePrimaryCtxRetain": fn(*mut Handle, Device);
    release = "cuDevicePrimaryCtxRelease_v2": fn(Device);
    push = "cuCtxPushCurrent_v2": fn(Handle);
    pop = "cuCtxPopCurrent_v2": fn(*mut Handle);
    synchronize = "cuCtxSynchronize": fn();
    allocate = "cuMemAlloc_v2": fn(*mut Address, usize);
    free = "cuMemFree_v2": fn(Address);
    fill = "cuMemsetD8_v2": fn(Address, u8, usize);
    to_device = "cuMemcpyHtoD_v2": fn(Address, *const c_void, usize);
    to_host = "cuMemcpyDtoH_v2": fn(*mut c_void, Address, usize);
    on_device = "cuMemcpyDtoD_v2": fn(Address, Address, usize);
    register_host = "cuMemHostRegister_v2": fn(*mut c_void, usize, c_uint);
    unregister_host = "cuMemHostUnregister": fn(*mut c_void);
}

impl Functions {
    fn check(&self, action: &'static str, code: Status) -> Result<(), Refusal> {
        if code == SUCCESS {
            return Ok(());
        }
        let mut name = ptr::null();
        // SAFETY: the library writes a pointer to one of its own constant strings, or none where it knows no name.
        let name = unsafe {
            if (self.error_name)(code, &raw mut name) == SUCCESS && !name.is_null() {
                CStr::from_ptr(name).to_string_lossy().into_owned()
            } else {
                "an unknown error".to_owned()
            }
        };
        Err(Refusal::Call { action, name, code })
    }
}

/// Why something could not be had or done.
pub(super) enum Refusal {
    /// The library cannot be loaded, or lacks a function.
    Library(String),
    /// The library has refused.
    Call {
        action: &'static str,
        /// Its own name for the code.
        name: String,
        code: Status,
    },
}

/// The context of a device that all of the process shares; given back when dropped.
pub(crate) struct Context {
    functions: Functions,
    /// Never unloaded: it has threads and handlers of its own.
    _library: ManuallyDrop<Library>,
    handle: Handle,
    device: Device,
    ordinal: u32,
}

// SAFETY: a context may be current on any number of threads at once, and the driver takes calls from all of them.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// While it lives, the context is the calling thread's current one.
struct Current<'a>(&'a Context);

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let mut popped = ptr::null_mut();
        // SAFETY: this thread has pushed the context, and everybody pops what he has pushed.
        let code = unsafe { (self.0.functions.pop)(&raw mut popped) };
        debug_assert!(
            code != SUCCESS || popped == self.0.handle,
            "ours was on top"
        );
    }
}

impl Context {
    /// Loads the driver and takes hold of a device's context.
    pub(super) fn open(library: &str, ordinal: u32) -> Result<Self, Refusal> {
        // SAFETY: the library's initialisers run, which is what whoever names the path asks for.
        let library = unsafe { Library::new(library) };
        let library = library.map_err(|error| Refusal::Library(in_full(&error)))?;
        let library = ManuallyDrop::new(library);
        let functions = Functions::resolve(&library).map_err(Refusal::Library)?;
        let (mut device, mut handle) = (0, ptr::null_mut());
        let number = Device::try_from(ordinal).unwrap_or(Device::MAX);
        // SAFETY: results are written to locals. `init` may be called again and again.
        unsafe {
            functions.check("start the driver", (functions.init)(0))?;
            let code = (functions.device)(&raw mut device, number);
            functions.check("find the device", code)?;
            let code = (functions.retain)(&raw mut handle, device);
            functions.check("open the device", code)?;
        }
        Ok(Self {
            functions,
            _library: library,
            handle,
            device,
            ordinal,
        })
    }

    /// The device, as the driver counts.
    pub(super) const fn device(&self) -> u32 {
        self.ordinal
    }

    fn enter(&self) -> Result<Current<'_>, Refusal> {
        // SAFETY: the context is held by `self`, which the guard borrows.
        let code = unsafe { (self.functions.push)(self.handle) };
        self.functions.check("enter the device's context", code)?;
        Ok(Current(self))
    }

    /// Makes a call in the context.
    fn call(&self, action: &'static str, call: impl FnOnce() -> Status) -> Result<(), Refusal> {
        let _current = self.enter()?;
        self.functions.check(action, call())
    }

    /// Makes a call in the context, and waits until what it has started is over.
    fn run(&self, action: &'static str, call: impl FnOnce() -> Status) -> Result<(), Refusal> {
        let _current = self.enter()?;
        self.functions.check(action, call())?;
        // SAFETY: takes nothing. Copies from host memory, and on the device, may return before they are over.
        let code = unsafe { (self.functions.synchronize)() };
        self.functions.check(action, code)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, by `open`. Refused while the process exits, when it no longer matters.
        unsafe { (self.functions.release)(self.device) };
    }
}

/// Bytes on a device, freed when dropped.
pub(crate) struct DeviceMemory {
    context: Arc<Context>,
    address: Address,
}

impl DeviceMemory {
    pub(super) fn allocate(context: Arc<Context>, len: u64) -> Result<Self, Refusal> {
        let mut address = 0;
        let f = &context.functions;
        // SAFETY: the result is written to a local.
        context.call("take memory", || unsafe {
            (f.allocate)(&raw mut address, len as usize)
        })?;
        let memory = Self { context, address };
        let f = &memory.context.functions;
        // SAFETY: `len` bytes were just allocated, which nobody else knows of.
        memory.context.run("clear memory", || unsafe {
            (f.fill)(address, 0, len as usize)
        })?;
        Ok(memory)
    }

    /// First byte, as the device counts.
    pub(crate) const fn address(&self) -> u64 {
        self.address
    }

    /// Whether both lie on one device.
    pub(crate) fn is_beside(&self, other: &Self) -> bool {
        self.context.device == other.context.device
    }

    /// Copies from host memory.
    ///
    /// # Safety
    /// `from` is followed by `len` readable bytes, and `offset + len` is at most what was allocated.
    pub(crate) unsafe fn write(
        &self,
        offset: u64,
        from: *const u8,
        len: u64,
    ) -> Result<(), MemoryError> {
        let to_device = self.context.functions.to_device;
        // SAFETY: the caller's promise.
        self.copy("copy to the device", len, || unsafe {
            to_device(self.address + offset, from.cast(), len as usize)
        })
    }

    /// Copies to host memory.
    ///
    /// # Safety
    /// `to` is followed by `len` writable bytes, and `offset + len` is at most what was allocated.
    pub(crate) unsafe fn read(
        &self,
        offset: u64,
        to: *mut u8,
        len: u64,
    ) -> Result<(), MemoryError> {
        let to_host = self.context.functions.to_host;
        // SAFETY: the caller's promise.
        self.copy("copy from the device", len, || unsafe {
            to_host(to.cast(), self.address + offset, len as usize)
        })
    }

    /// Copies to memory of the same device.
    ///
    /// # Safety
    /// Both ranges lie in what was allocated, on one device, and do not overlap.
    pub(crate) unsafe fn copy_to(
        &self,
        offset: u64,
        to: &Self,
        to_offset: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        let on_device = self.context.functions.on_device;
        // SAFETY: the caller's promise.
        self.copy("copy on the device", len, || unsafe {
            on_device(to.address + to_offset, self.address + offset, len as usize)
        })
    }

    fn copy(
        &self,
        action: &'static str,
        len: u64,
        call: impl FnOnce() -> Status,
    ) -> Result<(), MemoryError> {
        if len == 0 {
            return Ok(());
        }
        let copied = self.context.run(action, call);
        copied.map_err(|refusal| failed(self.context.device(), len, refusal))
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let f = &self.context.functions;
        // SAFETY: allocated once and freed once; whoever registered it holds the slab, and none of them is left.
        let freed = self
            .context
            .call("free memory", || unsafe { (f.free)(self.address) });
        // A driver that is going down with the process frees everything by itself.
        drop(freed);
    }
}

/// Host memory that devices reach directly.
pub(crate) struct Registration {
    context: Arc<Context>,
    base: NonNull<u8>,
}

// SAFETY: only the address is used, as a name; the driver takes calls from any thread.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

impl Registration {
    /// # Safety
    /// `len` bytes at `base` are mapped, and stay so until [`Self::take_back`] has succeeded.
    pub(crate) unsafe fn make(
        context: Arc<Context>,
        base: NonNull<u8>,
        len: u64,
    ) -> Result<Self, MemoryError> {
        let f = &context.functions;
        // SAFETY: the caller's promise.
        let registered = context.call("register host memory", || unsafe {
            (f.register_host)(base.as_ptr().cast(), len as usize, PORTABLE)
        });
        registered.map_err(|refusal| failed(context.device(), len, refusal))?;
        Ok(Self { context, base })
    }

    /// Ends it; `false` where the driver does not, so that the memory has to stay mapped.
    pub(crate) fn take_back(self) -> bool {
        let f = &self.context.functions;
        // SAFETY: registered once, by `make`, and taken back once.
        let taken = self.context.call("take host memory back", || unsafe {
            (f.unregister_host)(self.base.as_ptr().cast())
        });
        taken.is_ok()
    }
}
