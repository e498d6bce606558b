//! Compiles `proto/` without a system `protoc`.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from("../../proto");
    let files = ["types", "inference", "worker", "peer"]
        .map(|name| root.join(format!("orchestra/v1/{name}.proto")));
    println!("cargo::rerun-if-changed={}", root.display());

    let descriptors = protox::compile(&files, [&root])?;
    // Reflection serves this file, so that `grpcurl` and its like need no .proto at hand.
    let out = PathBuf::from(env::var("OUT_DIR")?).join("orchestra_descriptor.bin");
    fs::write(out, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
