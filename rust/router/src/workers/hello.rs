//! What a worker says about itself, checked.

use orchestra_core::scheduler::{NAME_BYTES_MAX, WorkerSpec};
use orchestra_proto::v1;

use super::kv_transfer::{self, KvTransfer};
use crate::models::WorkerLimits;

/// A hex SHA-256 has 64 characters.
const DIGEST_BYTES_MAX: usize = 64;

/// A worker's first message.
#[derive(Clone, Debug)]
pub(crate) struct Hello {
    pub(crate) spec: WorkerSpec,
    pub(crate) vocab_size: u32,
    pub(crate) model_files_digest: String,
    pub(crate) block_hashes: Vec<u64>,
    /// In host memory.
    pub(crate) host_block_hashes: Vec<u64>,
    pub(crate) kv: Option<KvTransfer>,
}

impl Hello {
    /// Checks every field; the message names the one that is wrong.
    pub(crate) fn from_wire(hello: v1::WorkerHello) -> Result<Self, String> {
        check_name("worker_id", &hello.worker_id, NAME_BYTES_MAX)?;
        check_name("model", &hello.model, NAME_BYTES_MAX)?;
        check_name(
            "model_files_digest",
            &hello.model_files_digest,
            DIGEST_BYTES_MAX,
        )?;
        let counts = [
            ("block_size", hello.block_size),
            ("num_blocks", hello.num_blocks),
            ("max_num_seqs", hello.max_num_seqs),
            ("max_model_len", hello.max_model_len),
            ("vocab_size", hello.vocab_size),
        ];
        if let Some((field, _)) = counts.into_iter().find(|&(_, count)| count == 0) {
            return Err(format!("hello.{field} must be at least 1"));
        }
        if !hello.block_size.is_power_of_two() {
            return Err("hello.block_size must be a power of two".to_owned());
        }
        if hello.block_hashes.len() > hello.num_blocks as usize {
            return Err("hello.block_hashes holds more than num_blocks blocks".to_owned());
        }
        if hello.host_block_hashes.len() > hello.num_host_blocks as usize {
            return Err(
                "hello.host_block_hashes holds more than num_host_blocks blocks".to_owned(),
            );
        }
        let transfer = hello.kv_transfer;
        let kv = transfer.map(|it| KvTransfer::from_wire(&hello.worker_id, it));
        let kv = kv.transpose()?;
        Ok(Self {
            spec: WorkerSpec {
                kv_exchange: kv.as_ref().map(|kv| kv.exchange().clone()),
                role: kv_transfer::role(hello.role)?,
                name: hello.worker_id,
                model: hello.model,
                weights_epoch: hello.weights_epoch,
                block_size: hello.block_size,
                num_blocks: hello.num_blocks,
                num_host_blocks: hello.num_host_blocks,
                max_num_seqs: hello.max_num_seqs,
                max_model_len: hello.max_model_len,
                ..WorkerSpec::default()
            },
            vocab_size: hello.vocab_size,
            model_files_digest: hello.model_files_digest,
            block_hashes: hello.block_hashes,
            host_block_hashes: hello.host_block_hashes,
            kv,
        })
    }

    /// What a sequence may ask of the worker. All its KV blocks are as much as its context.
    pub(crate) fn limits(&self) -> WorkerLimits {
        let kv_tokens = self.spec.block_size.saturating_mul(self.spec.num_blocks);
        WorkerLimits {
            max_model_len: self.spec.max_model_len.min(kv_tokens),
            vocab_size: self.vocab_size,
        }
    }
}

fn check_name(field: &str, name: &str, limit: usize) -> Result<(), String> {
    if name.is_empty() || name.len() > limit || name.chars().any(char::is_control) {
        return Err(format!(
            "hello.{field} must have 1 to {limit} bytes, without control characters"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> v1::WorkerHello {
        v1::WorkerHello {
            worker_id: "w".to_owned(),
            model: "m".to_owned(),
            block_size: 16,
            num_blocks: 4,
            max_num_seqs: 1,
            max_model_len: 1000,
            model_files_digest: "d".to_owned(),
            vocab_size: 10,
            kv_transfer: Some(v1::KvTransfer {
                epoch: 1,
                metadata: [("shm".to_owned(), vec![1, 2])].into(),
                bytes_per_block: 4096,
                layout: "bf16".to_owned(),
                host: "h".to_owned(),
            }),
            ..v1::WorkerHello::default()
        }
    }

    fn kv(hello: &mut v1::WorkerHello) -> &mut v1::KvTransfer {
        hello.kv_transfer.as_mut().unwrap()
    }

    #[test]
    fn what_opens_a_worker_s_memory_does_not_print() {
        let mut hello = valid();
        let secret = b"sesame".to_vec();
        kv(&mut hello).metadata.insert("tcp".to_owned(), secret);
        let shown = format!("{:?}", Hello::from_wire(hello).unwrap());
        assert!(shown.contains("bf16"), "{shown}");
        assert!(
            !shown.contains("115, 101") && !shown.contains("sesame"),
            "{shown}"
        );
    }

    #[test]
    fn a_sequence_never_needs_more_than_all_the_kv() {
        assert_eq!(
            Hello::from_wire(valid()).unwrap().limits().max_model_len,
            64
        );
    }

    #[test]
    fn each_bad_field_is_named() {
        type Spoil = fn(&mut v1::WorkerHello);
        let spoilers: [(&str, Spoil); 20] = [
            ("worker_id", |hello| hello.worker_id.clear()),
            ("worker_id", |hello| hello.worker_id.push('\n')),
            ("model", |hello| {
                hello.model = "m".repeat(129);
            }),
            ("model_files_digest", |hello| {
                hello.model_files_digest = "d".repeat(65);
            }),
            ("block_size", |hello| {
                hello.block_size = 12;
            }),
            ("num_blocks", |hello| {
                hello.num_blocks = 0;
            }),
            ("max_num_seqs", |hello| {
                hello.max_num_seqs = 0;
            }),
            ("max_model_len", |hello| {
                hello.max_model_len = 0;
            }),
            ("vocab_size", |hello| {
                hello.vocab_size = 0;
            }),
            ("block_hashes", |hello| {
                hello.block_hashes = vec![0; 5];
            }),
            ("host_block_hashes", |hello| {
                hello.host_block_hashes = vec![0; 1];
            }),
            ("role", |hello| hello.role = 9),
            ("kv_transfer.metadata", |hello| kv(hello).metadata.clear()),
            ("kv_transfer.metadata", |hello| {
                let names = (0..9).map(|number| (number.to_string(), Vec::new()));
                kv(hello).metadata.extend(names);
            }),
            ("kv_transfer.metadata", |hello| {
                kv(hello).metadata.insert("s".repeat(33), Vec::new());
            }),
            ("kv_transfer.metadata", |hello| {
                kv(hello).metadata.insert("tcp".into(), vec![0; 65_537]);
            }),
            ("kv_transfer.layout", |hello| kv(hello).layout.clear()),
            ("kv_transfer.layout", |hello| {
                kv(hello).layout = "l".repeat(257);
            }),
            ("kv_transfer.host", |hello| kv(hello).host = "h".repeat(129)),
            ("kv_transfer.bytes_per_block", |hello| {
                kv(hello).bytes_per_block = 0;
            }),
        ];
        for (field, spoil) in spoilers {
            let mut hello = valid();
            spoil(&mut hello);
            let error = Hello::from_wire(hello).unwrap_err();
            assert!(
                error.contains(&format!("hello.{field} ")),
                "{field}: {error}"
            );
        }
    }
}
