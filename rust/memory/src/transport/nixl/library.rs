//! Where NIXL's library is looked for.

use std::{env, fs, path::PathBuf};

use super::ffi::{Nixl, load};
use crate::error::MemoryError;

/// The variable that names the library, by full path. Where it is set, nothing else is tried.
pub const LIBRARY_VARIABLE: &str = "ORCHESTRA_NIXL_LIB";

/// The wheels that bring the library, and the folder beside the package in which it lies.
const WHEEL_FOLDERS: [&str; 2] = [".nixl_cu13.mesonpy.libs", ".nixl_cu12.mesonpy.libs"];
const LIBRARY: &str = "libnixl_capi.so";
/// The system's own search path.
const BARE_NAMES: [&str; 2] = ["libnixl_capi.so.0", LIBRARY];

/// Loads the first library that there is; the error names all that were looked for.
pub(super) fn find(site_packages: &[PathBuf]) -> Result<Nixl, MemoryError> {
    refuse_broken_verbs()?;
    let mut tried = Vec::new();
    for path in candidates(env::var(LIBRARY_VARIABLE).ok(), site_packages) {
        match load(&path) {
            Ok(nixl) => return Ok(nixl),
            Err(reason) => tried.push(format!("{path}: {reason}")),
        }
    }
    Err(unavailable(tried.join("; ")))
}

fn candidates(named: Option<String>, site_packages: &[PathBuf]) -> Vec<String> {
    if let Some(named) = named {
        return vec![named];
    }
    let in_wheels = site_packages.iter().flat_map(|folder| {
        WHEEL_FOLDERS.map(|wheel| {
            folder
                .join(wheel)
                .join(LIBRARY)
                .to_string_lossy()
                .into_owned()
        })
    });
    in_wheels.chain(BARE_NAMES.map(str::to_owned)).collect()
}

pub(super) const fn unavailable(reason: String) -> MemoryError {
    MemoryError::Unavailable {
        transport: "nixl",
        reason,
    }
}

/// UCX's verbs module ends the process at its exit where the drivers are installed and no card is. The variable that
/// keeps it out must be set before the process starts: setting one while other threads read others is not safe.
fn refuse_broken_verbs() -> Result<(), MemoryError> {
    let has_card = fs::exists("/dev/infiniband").unwrap_or(false);
    let has_drivers =
        fs::read_dir("/etc/libibverbs.d").is_ok_and(|mut drivers| drivers.next().is_some());
    if has_drivers && !has_card && env::var_os("UCX_MODULES").is_none() {
        return Err(unavailable(
            "verbs drivers without an InfiniBand device: start the process with UCX_MODULES=^ib"
                .to_owned(),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_library_is_the_only_one_tried() {
        let named = candidates(Some("/opt/nixl.so".to_owned()), &[PathBuf::from("/site")]);
        assert_eq!(named, ["/opt/nixl.so"]);
    }

    #[test]
    fn wheels_come_before_the_search_path() {
        let order = candidates(None, &[PathBuf::from("/site")]);
        let expected = [
            "/site/.nixl_cu13.mesonpy.libs/libnixl_capi.so",
            "/site/.nixl_cu12.mesonpy.libs/libnixl_capi.so",
            "libnixl_capi.so.0",
            "libnixl_capi.so",
        ];
        assert_eq!(order, expected);
    }
}
