//! A trace of requests: one JSON object a line with `input_length`, `output_length` and `hash_ids`, one id per 512
//! tokens. Equal ids mean equal prompts up to that point.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
    rc::Rc,
};

use orchestra_core::BlockHash;

pub(crate) const TRACE_BLOCK: u32 = 512;

pub(crate) struct TraceRow {
    pub(crate) input: u32,
    pub(crate) output: u32,
    hash_ids: Vec<u64>,
}

impl TraceRow {
    /// Hashes of the row's full blocks. All replays share the first 512 tokens, as all rows of the trace do.
    pub(crate) fn chain(&self, block: u32, replay: u64) -> Rc<[BlockHash]> {
        let parts = u64::from(TRACE_BLOCK / block);
        let of_id = |&id: &u64| {
            let replay = if id == 0 { 0 } else { replay };
            (0..parts).map(move |part| BlockHash(mix(mix(id * 64 + part) ^ mix(replay))))
        };
        let num_full = (self.input / block) as usize;
        self.hash_ids
            .iter()
            .flat_map(of_id)
            .take(num_full)
            .collect()
    }
}

pub(crate) fn read_trace(path: &str) -> Vec<TraceRow> {
    let file = File::open(path).unwrap();
    let reader: Box<dyn Read> = if Path::new(path)
        .extension()
        .is_some_and(|extension| extension == "gz")
    {
        Box::new(flate2::read::GzDecoder::new(file))
    } else {
        Box::new(file)
    };
    let row = |line: std::io::Result<String>| {
        let row: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
        let ids = row["hash_ids"].as_array().unwrap().iter();
        TraceRow {
            input: row["input_length"].as_u64().unwrap().max(1) as u32,
            output: row["output_length"].as_u64().unwrap().max(1) as u32,
            hash_ids: ids.map(|id| id.as_u64().unwrap()).collect(),
        }
    };
    BufReader::new(reader).lines().map(row).collect()
}

/// A well-spread number: a block's hash from its id, replay and place in the 512 tokens.
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
