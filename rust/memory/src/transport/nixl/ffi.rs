//! The part of NIXL's C interface that we use, and a safe handle on it. All `unsafe` code of this transport.
//!
//! Written against `libnixl_capi.so` of NIXL 1.5. The interface is not declared stable, so a missing function is an
//! error when the library is loaded, not when it is called. One value differs between versions: the configuration of
//! an agent, whose layout moved. [`AgentConfig`] holds the same bytes for both.

#![expect(unsafe_code, reason = "calls a C library")]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    mem::ManuallyDrop,
    ptr::{self, NonNull},
    slice,
};

use libloading::Library;

use crate::{error::in_full, tier::Tier, transport::Direction};

type Handle = *mut c_void;
type Status = c_int;

const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 1;
/// `NIXL_CAPI_MEM_DRAM`.
const DRAM: c_int = 0;
/// `NIXL_CAPI_MEM_VRAM`.
const VRAM: c_int = 1;

/// `nixl_capi_agent_config_t`. Everything is off: no progress thread, no listener, no telemetry. The word at offset 8 is
/// the number of workers in newer versions, and in 1.5 the kind of locking, where 1 is the strictest.
#[repr(C)]
struct AgentConfig {
    switches: u64,
    workers_or_locking: u64,
    rest: [u64; 6],
}

// SAFETY: not unsafe by itself. libc's own, for what the library allocates and hands over.
unsafe extern "C" {
    fn free(pointer: *mut c_void);
}

macro_rules! functions {
    ($($field:ident: fn($($argument:ty),*);)*) => {
        /// The functions, resolved once.
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> Status,)*
        }

        impl Functions {
            fn resolve(library: &Library) -> Result<Self, String> {
                Ok(Self {
                    $($field: {
                        let symbol = concat!("nixl_capi_", stringify!($field), "\0");
                        // SAFETY: the type is that of the function of this name in NIXL's header.
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
    create_configured_agent: fn(*const c_char, *const AgentConfig, *mut Handle);
    destroy_agent: fn(Handle);
    get_plugin_params: fn(Handle, *const c_char, *mut Handle, *mut Handle);
    destroy_mem_list: fn(Handle);
    destroy_params: fn(Handle);
    create_backend: fn(Handle, *const c_char, Handle, *mut Handle);
    destroy_backend: fn(Handle);
    create_reg_dlist: fn(c_int, *mut Handle);
    reg_dlist_add_desc: fn(Handle, usize, usize, u64, *const c_void, usize);
    destroy_reg_dlist: fn(Handle);
    register_mem: fn(Handle, Handle, Handle);
    deregister_mem: fn(Handle, Handle, Handle);
    get_local_md: fn(Handle, *mut *mut c_void, *mut usize);
    load_remote_md: fn(Handle, *const c_void, usize, *mut *mut c_char);
    invalidate_remote_md: fn(Handle, *const c_char);
    create_opt_args: fn(*mut Handle);
    opt_args_set_notif_msg: fn(Handle, *const c_void, usize);
    opt_args_set_has_notif: fn(Handle, bool);
    destroy_opt_args: fn(Handle);
    create_xfer_dlist: fn(c_int, *mut Handle);
    xfer_dlist_add_desc: fn(Handle, usize, usize, u64);
    destroy_xfer_dlist: fn(Handle);
    create_xfer_req: fn(Handle, c_int, Handle, Handle, *const c_char, *mut Handle, Handle);
    post_xfer_req: fn(Handle, Handle, Handle);
    get_xfer_status: fn(Handle, Handle);
    release_xfer_req: fn(Handle, Handle);
    destroy_xfer_req: fn(Handle);
    gen_notif: fn(Handle, *const c_char, *const c_void, usize, Handle);
    create_notif_map: fn(*mut Handle);
    destroy_notif_map: fn(Handle);
    get_notifs: fn(Handle, Handle, Handle);
    notif_map_size: fn(Handle, *mut usize);
    notif_map_get_agent_at: fn(Handle, usize, *mut *const c_char);
    notif_map_get_notifs_size: fn(Handle, *const c_char, *mut usize);
    notif_map_get_notif: fn(Handle, *const c_char, usize, *mut *const c_void, *mut usize);
}

/// The loaded library. Never unloaded: it starts threads and registers handlers that outlive any agent.
pub(super) struct Nixl {
    functions: Functions,
    _library: ManuallyDrop<Library>,
}

/// Opens the library and checks that it is the real one; the error says what was wrong.
pub(super) fn load(path: &str) -> Result<Nixl, String> {
    // SAFETY: the library's initialisers run, which is what whoever names the path asks for.
    let library = unsafe { Library::new(path) }.map_err(|error| in_full(&error))?;
    let library = ManuallyDrop::new(library);
    // SAFETY: the type is that of the function of this name in NIXL's header; it takes nothing and cannot fail.
    let is_stub = unsafe {
        library
            .get::<unsafe extern "C" fn() -> bool>(b"nixl_capi_is_stub\0")
            .map(|is_stub| is_stub())
    };
    if is_stub.map_err(|error| in_full(&error))? {
        return Err("it is a stub: the library behind it is not installed".to_owned());
    }
    let functions = Functions::resolve(&library)?;
    Ok(Nixl {
        functions,
        _library: library,
    })
}

fn check(status: Status) -> Result<(), Status> {
    if status == SUCCESS {
        Ok(())
    } else {
        Err(status)
    }
}

/// A handle that the library made, and the function that takes it back.
struct Owned {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle) -> Status,
}

impl Owned {
    fn make(
        make: impl FnOnce(*mut Handle) -> Status,
        destroy: unsafe extern "C" fn(Handle) -> Status,
    ) -> Result<Self, Status> {
        let mut handle = ptr::null_mut();
        check(make(&raw mut handle))?;
        Ok(Self { handle, destroy })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: the handle came from the function that belongs to `destroy`, and is given back once.
        unsafe { (self.destroy)(self.handle) };
    }
}

/// A transfer that was posted.
pub(super) struct Request(NonNull<c_void>);

// SAFETY: the library ties no handle to a thread; the caller's lock keeps calls one at a time.
unsafe impl Send for Request {}

/// Where a request stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    Running,
    Done,
    Failed(Status),
}

/// Bytes of somebody's memory, by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) address: u64,
    pub(super) len: u64,
    pub(super) tier: Tier,
}

impl Extent {
    /// The kind of memory that a list with this extent is of. Pinned memory is main memory to the library.
    pub(super) const fn kind(&self) -> c_int {
        if self.tier.is_host() { DRAM } else { VRAM }
    }

    /// The device, and 0 for main memory.
    const fn device(&self) -> u64 {
        match self.tier.device() {
            Some(device) => device as u64,
            None => 0,
        }
    }
}

/// A notification that arrived.
pub(super) struct Arrived {
    /// The name of the agent that sent it.
    pub(super) sender: Vec<u8>,
    pub(super) payload: Vec<u8>,
}

/// One end of NIXL's connections, with one backend.
pub(super) struct Agent {
    nixl: Nixl,
    handle: Handle,
    backend: Handle,
}

// SAFETY: the library ties no agent to a thread; `&mut self` keeps calls one at a time.
unsafe impl Send for Agent {}

impl Agent {
    pub(super) fn create(nixl: Nixl, name: &CStr, backend: &CStr) -> Result<Self, Status> {
        let config = AgentConfig {
            switches: 0,
            workers_or_locking: 1,
            rest: [0; 6],
        };
        let mut agent = Self {
            nixl,
            handle: ptr::null_mut(),
            backend: ptr::null_mut(),
        };
        let f = &agent.nixl.functions;
        let (mut memories, mut parameters) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the strings end in a zero byte, the configuration is larger than any version of it, and the results
        // are written to locals. What is made here is given back here, or in `drop`.
        unsafe {
            check((f.create_configured_agent)(
                name.as_ptr(),
                &raw const config,
                &raw mut agent.handle,
            ))?;
            check((f.get_plugin_params)(
                agent.handle,
                backend.as_ptr(),
                &raw mut memories,
                &raw mut parameters,
            ))?;
            let made = (f.create_backend)(
                agent.handle,
                backend.as_ptr(),
                parameters,
                &raw mut agent.backend,
            );
            (f.destroy_params)(parameters);
            (f.destroy_mem_list)(memories);
            check(made)?;
        }
        Ok(agent)
    }

    /// Registers memory, or takes that back. The memory must stay mapped as long as the agent lives.
    pub(super) fn register(&mut self, memory: Extent, registered: bool) -> Result<(), Status> {
        let f = &self.nixl.functions;
        // SAFETY: the list outlives the call, and a registration without extra bytes takes a null pointer.
        unsafe {
            let list = Owned::make(
                |out| (f.create_reg_dlist)(memory.kind(), out),
                f.destroy_reg_dlist,
            )?;
            let (address, len) = (memory.address as usize, memory.len as usize);
            check((f.reg_dlist_add_desc)(
                list.handle,
                address,
                len,
                memory.device(),
                ptr::null(),
                0,
            ))?;
            let call = if registered {
                f.register_mem
            } else {
                f.deregister_mem
            };
            check(call(self.handle, list.handle, ptr::null_mut()))
        }
    }

    /// What a peer loads to reach this agent.
    pub(super) fn local_metadata(&mut self) -> Result<Vec<u8>, Status> {
        let (mut data, mut len) = (ptr::null_mut(), 0);
        // SAFETY: on success `data` is `len` bytes from malloc that are ours.
        unsafe {
            check((self.nixl.functions.get_local_md)(
                self.handle,
                &raw mut data,
                &raw mut len,
            ))?;
            let bytes = copied(data, len);
            free(data);
            Ok(bytes)
        }
    }

    /// Learns of a peer; its name as the library knows it.
    pub(super) fn load_remote(&mut self, metadata: &[u8]) -> Result<CString, Status> {
        let mut name = ptr::null_mut();
        let data = metadata.as_ptr().cast();
        // SAFETY: on success `name` is a string from malloc that is ours.
        unsafe {
            check((self.nixl.functions.load_remote_md)(
                self.handle,
                data,
                metadata.len(),
                &raw mut name,
            ))?;
            let owned = CStr::from_ptr(name).to_owned();
            free(name.cast());
            Ok(owned)
        }
    }

    pub(super) fn forget_remote(&mut self, name: &CStr) {
        // SAFETY: the string ends in a zero byte. An unknown name is refused, which is as good.
        unsafe { (self.nixl.functions.invalidate_remote_md)(self.handle, name.as_ptr()) };
    }

    /// Starts a transfer between extents, pair by pair. The caller has checked them all, and that each side is of one
    /// kind of memory.
    pub(super) fn post(
        &mut self,
        direction: Direction,
        peer: &CStr,
        pairs: &[(Extent, Extent)],
        notification: Option<&[u8]>,
    ) -> Result<(Request, Standing), Status> {
        let f = &self.nixl.functions;
        let operation = match direction {
            Direction::Get => 0,
            Direction::Put => 1,
        };
        // SAFETY: lists and arguments outlive the calls that take them, and the library copies what it keeps.
        unsafe {
            let ours = self.list(pairs.iter().map(|(ours, _)| ours))?;
            let theirs = self.list(pairs.iter().map(|(_, theirs)| theirs))?;
            let options = Owned::make(|out| (f.create_opt_args)(out), f.destroy_opt_args)?;
            if let Some(payload) = notification {
                let data = payload.as_ptr().cast();
                check((f.opt_args_set_notif_msg)(
                    options.handle,
                    data,
                    payload.len(),
                ))?;
                check((f.opt_args_set_has_notif)(options.handle, true))?;
            }
            let mut request = ptr::null_mut();
            check((f.create_xfer_req)(
                self.handle,
                operation,
                ours.handle,
                theirs.handle,
                peer.as_ptr(),
                &raw mut request,
                options.handle,
            ))?;
            let request = NonNull::new(request).map(Request).ok_or(-1)?;
            let status = (f.post_xfer_req)(self.handle, request.0.as_ptr(), options.handle);
            Ok((request, standing(status)))
        }
    }

    /// One side of a transfer, all of one kind of memory.
    fn list<'a>(&self, extents: impl Iterator<Item = &'a Extent>) -> Result<Owned, Status> {
        let f = &self.nixl.functions;
        let mut extents = extents.peekable();
        let kind = extents.peek().map_or(DRAM, |extent| extent.kind());
        // SAFETY: the list lives while it is filled, with numbers.
        unsafe {
            let list = Owned::make(|out| (f.create_xfer_dlist)(kind, out), f.destroy_xfer_dlist)?;
            for extent in extents {
                let (address, len) = (extent.address as usize, extent.len as usize);
                let device = extent.device();
                check((f.xfer_dlist_add_desc)(list.handle, address, len, device))?;
            }
            Ok(list)
        }
    }

    /// Asks for a request, which also makes the library work on it.
    pub(super) fn standing(&mut self, request: &Request) -> Standing {
        // SAFETY: the request is one of this agent's that was not released.
        standing(unsafe { (self.nixl.functions.get_xfer_status)(self.handle, request.0.as_ptr()) })
    }

    /// Gives a request back. Does not stop one that runs.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the handle is gone afterwards"
    )]
    pub(super) fn release(&mut self, request: Request) {
        let f = &self.nixl.functions;
        // SAFETY: the request is one of this agent's, and is given back once. The wrapper of one that the library will
        // not release is refused by `destroy_xfer_req` and stays: a leak, not a danger.
        unsafe {
            (f.release_xfer_req)(self.handle, request.0.as_ptr());
            (f.destroy_xfer_req)(request.0.as_ptr());
        }
    }

    /// A notification without bytes to move.
    pub(super) fn notify(&mut self, peer: &CStr, payload: &[u8]) -> Result<(), Status> {
        let data = payload.as_ptr().cast();
        let none = ptr::null_mut();
        // SAFETY: the payload outlives the call, which copies it; options may be null.
        check(unsafe {
            (self.nixl.functions.gen_notif)(self.handle, peer.as_ptr(), data, payload.len(), none)
        })
    }

    /// What has arrived. Asking also makes the library serve its peers.
    pub(super) fn notifications(&mut self) -> Result<Vec<Arrived>, Status> {
        let f = &self.nixl.functions;
        let mut arrived = Vec::new();
        // SAFETY: the map outlives everything that is read from it, and all of that is copied before it goes.
        unsafe {
            let map = Owned::make(|out| (f.create_notif_map)(out), f.destroy_notif_map)?;
            check((f.get_notifs)(self.handle, map.handle, ptr::null_mut()))?;
            let mut senders = 0;
            check((f.notif_map_size)(map.handle, &raw mut senders))?;
            for sender in 0..senders {
                let mut name = ptr::null();
                check((f.notif_map_get_agent_at)(
                    map.handle,
                    sender,
                    &raw mut name,
                ))?;
                let mut count = 0;
                check((f.notif_map_get_notifs_size)(
                    map.handle,
                    name,
                    &raw mut count,
                ))?;
                for at in 0..count {
                    let (mut data, mut len) = (ptr::null(), 0);
                    check((f.notif_map_get_notif)(
                        map.handle,
                        name,
                        at,
                        &raw mut data,
                        &raw mut len,
                    ))?;
                    arrived.push(Arrived {
                        sender: CStr::from_ptr(name).to_bytes().to_vec(),
                        payload: copied(data, len),
                    });
                }
            }
        }
        Ok(arrived)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let f = &self.nixl.functions;
        // SAFETY: made by `create`, given back once, and the backend before the agent that made it.
        unsafe {
            if !self.backend.is_null() {
                (f.destroy_backend)(self.backend);
            }
            if !self.handle.is_null() {
                (f.destroy_agent)(self.handle);
            }
        }
    }
}

/// A copy of bytes of the library's.
///
/// # Safety
/// `data` must be null or be followed by `len` bytes that nobody writes meanwhile.
unsafe fn copied(data: *const c_void, len: usize) -> Vec<u8> {
    if data.is_null() || len == 0 {
        return Vec::new();
    }
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts(data.cast::<u8>(), len) }.to_vec()
}

const fn standing(status: Status) -> Standing {
    match status {
        SUCCESS => Standing::Done,
        IN_PROGRESS => Standing::Running,
        failed => Standing::Failed(failed),
    }
}
