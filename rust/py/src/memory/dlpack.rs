//! The capsule in which Python hands a `DLPack` tensor from one library to another.

#![expect(
    unsafe_code,
    reason = "a capsule holds a bare pointer, which its destructor frees"
)]

use std::{ffi::CStr, ptr::NonNull};

use orchestra_memory::{
    MemoryError, Region,
    dlpack::{self as memory, Managed},
};
use pyo3::{ffi, prelude::*, types::PyCapsule};

const VERSIONED: &CStr = c"dltensor_versioned";
const PLAIN: &CStr = c"dltensor";

/// Puts a tensor into a capsule. A library that takes it gives the capsule another name.
pub(super) fn capsule(py: Python<'_>, managed: Managed) -> PyResult<Bound<'_, PyCapsule>> {
    let (pointer, name, destructor): (_, _, ffi::PyCapsule_Destructor) = match &managed {
        Managed::Versioned(pointer) => (*pointer, VERSIONED, discard_versioned),
        Managed::Plain(pointer) => (*pointer, PLAIN, discard_plain),
    };
    // SAFETY: the structure lives until its deleter is called: by the destructor, or by who has renamed the capsule.
    let made =
        unsafe { PyCapsule::new_with_pointer_and_destructor(py, pointer, name, Some(destructor)) };
    if made.is_err() {
        // SAFETY: there is no capsule, so nobody else has the pointer.
        unsafe { managed.discard() };
    }
    made
}

/// Where the tensor of somebody's capsule lies, and whether it may be written. The capsule keeps it there while it lives.
pub(super) fn describe(capsule: &Bound<'_, PyAny>) -> Result<(Region, bool), MemoryError> {
    let object = capsule.as_ptr();
    // SAFETY: only a capsule of that name is looked into, which by the protocol holds such a structure until it is taken.
    unsafe {
        let managed = match untaken(object, VERSIONED) {
            Some(pointer) => Managed::Versioned(pointer),
            None => Managed::Plain(untaken(object, PLAIN).ok_or(MemoryError::InvalidField {
                field: "memory",
                expected: "a tensor of DLPack 1 or older",
            })?),
        };
        memory::describe(&managed)
    }
}

/// # Safety
/// Called by the interpreter alone, with a capsule that [`capsule`] made.
unsafe extern "C" fn discard_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter calls this with the capsule while it ends it.
    if let Some(pointer) = unsafe { untaken(capsule, VERSIONED) } {
        // SAFETY: a capsule that has its first name was taken by nobody.
        unsafe { Managed::Versioned(pointer).discard() };
    }
}

/// # Safety
/// Called by the interpreter alone, with a capsule that [`capsule`] made.
unsafe extern "C" fn discard_plain(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter calls this with the capsule while it ends it.
    if let Some(pointer) = unsafe { untaken(capsule, PLAIN) } {
        // SAFETY: a capsule that has its first name was taken by nobody.
        unsafe { Managed::Plain(pointer).discard() };
    }
}

/// What a capsule holds, where nobody has taken it.
///
/// # Safety
/// `capsule` is an object.
unsafe fn untaken(capsule: *mut ffi::PyObject, name: &CStr) -> Option<NonNull<std::ffi::c_void>> {
    // SAFETY: both calls only look at the capsule that the caller vouches for; the first says that the second may.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, name.as_ptr()) == 0 {
            return None;
        }
        NonNull::new(ffi::PyCapsule_GetPointer(capsule, name.as_ptr()))
    }
}
