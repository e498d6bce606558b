//! Plans and answers as bytes.

use std::sync::Arc;

use orchestra_agent::{
    OutputBuffers, OutputError, encode_plan,
    plan_codec::{Wanted, num_top_logprobs},
};
use orchestra_core::{
    BlockId, RequestId, SamplingParams,
    step::{BlockCopies, FilledBlocks, HoldId, PENDING_TOKEN, Sample, SequenceStart, StepPlan},
};
use serde::Deserialize;
use serde_bytes::ByteBuf;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StartMap {
    slot: u32,
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    seed: u64,
    logit_bias_ids: ByteBuf,
    logit_bias_values: ByteBuf,
    prompt_token_ids: ByteBuf,
    output_token_ids: ByteBuf,
}

fn sample(sequence_index: u32, logprobs: Option<u32>) -> Sample {
    Sample {
        request_id: RequestId(u64::from(sequence_index)),
        sequence_index,
        slot: 7 - sequence_index,
        position: 40 + sequence_index,
        logprobs,
    }
}

/// One sequence decodes, one prefills and draws, with log-probabilities.
fn plan() -> StepPlan {
    let sampling = SamplingParams {
        temperature: 0.5,
        seed: u64::MAX,
        logit_bias: vec![(300, -1.5)],
        ..SamplingParams::default()
    };
    StepPlan {
        step_id: 9,
        token_ids: vec![5, 6, 70_000],
        positions: vec![3, 0, 1],
        slot_mapping: vec![19, 32, 33],
        query_start: vec![0, 1, 3],
        context_lens: vec![4, 2],
        slots: vec![7, 6],
        block_table_width: 1,
        update_slots: vec![6, 6],
        update_columns: vec![0, 1],
        update_blocks: vec![2, 5],
        swap_out: BlockCopies {
            blocks: vec![3],
            host_blocks: vec![8],
        },
        swap_in: BlockCopies {
            blocks: vec![4, 9],
            host_blocks: vec![1, 0],
        },
        samples: vec![sample(0, None), sample(1, Some(2))],
        starts: vec![SequenceStart {
            slot: 6,
            sampling: Arc::new(sampling),
            prompt_token_ids: vec![1, 2],
            output_token_ids: vec![],
        }],
        filled: vec![FilledBlocks {
            request_id: RequestId(1),
            first_block: 0,
            hold: HoldId(1),
            blocks: vec![BlockId(3)],
        }],
    }
}

fn int32(bytes: &[u8]) -> Vec<i32> {
    bytes
        .chunks_exact(4)
        .map(|word| i32::from_le_bytes(word.try_into().unwrap()))
        .collect()
}

fn bytes_of<const N: usize>(words: &[[u8; 4]; N]) -> Vec<u8> {
    words.concat()
}

/// The numbers of a message from `offset` on.
fn words<const N: usize>(bytes: &[u8], offset: usize) -> [i32; N] {
    int32(&bytes[offset..offset + 4 * N]).try_into().unwrap()
}

#[test]
fn a_plan_is_its_lengths_and_its_arrays() {
    let bytes = encode_plan(&plan()).unwrap();
    assert_eq!(&bytes[..4], b"plan");
    let [
        width,
        step_id,
        high,
        num_top_logprobs,
        flags,
        num_start_bytes,
    ] = words(&bytes, 4);
    assert_eq!((width, step_id, high), (1, 9, 0));
    assert_eq!((num_top_logprobs, flags), (2, 1));
    let lengths: [i32; 16] = words(&bytes, 28);
    let arrays: [&[i32]; 16] = [
        &[5, 6, 70_000],
        &[3, 0, 1],
        &[19, 32, 33],
        &[0, 1, 3],
        &[4, 2],
        &[7, 6],
        &[6, 6],
        &[0, 1],
        &[2, 5],
        &[3],
        &[8],
        &[4, 9],
        &[1, 0],
        &[0, 1],
        &[7, 6],
        &[40, 41],
    ];
    let (numbers, starts) = bytes[92..].split_at(bytes.len() - 92 - num_start_bytes as usize);
    assert_eq!(int32(numbers), arrays.concat());
    assert_eq!(lengths, arrays.map(|array| array.len() as i32));

    let starts: Vec<StartMap> = rmp_serde::from_slice(starts).unwrap();
    let [start] = &starts[..] else {
        panic!("one sequence starts");
    };
    assert_eq!((start.slot, start.seed, start.top_k), (6, u64::MAX, 0));
    let numbers = [
        (start.temperature, 0.5),
        (start.top_p, 1.0),
        (start.min_p, 0.0),
        (start.repetition_penalty, 1.0),
        (start.presence_penalty, 0.0),
        (start.frequency_penalty, 0.0),
    ];
    for (found, expected) in numbers {
        assert!((found - expected).abs() < f32::EPSILON);
    }
    assert_eq!(int32(&start.logit_bias_ids), [300]);
    assert_eq!(start.logit_bias_values.as_slice(), (-1.5_f32).to_le_bytes());
    assert_eq!(int32(&start.prompt_token_ids), [1, 2]);
    assert!(start.output_token_ids.is_empty());
}

#[test]
fn a_plan_of_nothing_special_is_arrays_alone() {
    let plain = StepPlan {
        step_id: u64::MAX,
        token_ids: vec![PENDING_TOKEN],
        ..StepPlan::default()
    };
    let bytes = encode_plan(&plain).unwrap();
    assert_eq!(words(&bytes, 8), [-1, -1, -1, 2, 0, 1, 0]);
    assert_eq!(bytes.len(), 92 + 4);
    assert_eq!(words(&bytes, 92), [-1]);
}

#[test]
fn the_most_alternatives_asked_for_are_named() {
    let with = |samples: &[Option<u32>]| {
        let samples = samples
            .iter()
            .map(|&logprobs| sample(0, logprobs))
            .collect();
        num_top_logprobs(&StepPlan {
            samples,
            ..StepPlan::default()
        })
    };
    assert_eq!(with(&[]), None);
    assert_eq!(with(&[None, None]), None);
    assert_eq!(with(&[None, Some(0)]), Some(0));
    assert_eq!(with(&[Some(3), None, Some(1)]), Some(3));
}

#[test]
fn an_answer_gives_each_sample_what_it_asked_for() {
    let mut plan = plan();
    plan.samples.push(sample(2, Some(1)));
    let token_ids = bytes_of(&[11, 12, 13_i32].map(i32::to_le_bytes));
    let chosen_logprobs = bytes_of(&[-1.0, -2.0, -3.0_f32].map(f32::to_le_bytes));
    let top_ids = bytes_of(&[0, 1, 2, 3, 4, 5_i32].map(i32::to_le_bytes));
    let top_logprobs = bytes_of(&[-0.1, -0.2, -0.3, -0.4, -0.5, -0.6_f32].map(f32::to_le_bytes));
    let buffers = OutputBuffers {
        token_ids: &token_ids,
        chosen_logprobs: &chosen_logprobs,
        top_ids: &top_ids,
        top_logprobs: &top_logprobs,
    };
    let output = Wanted::new(&plan, 1000).decode(9, &buffers).unwrap();
    assert_eq!((output.step_id, output.token_ids), (9, vec![11, 12, 13]));
    assert_eq!(output.logprobs[0], None);
    let second = output.logprobs[1].as_ref().unwrap();
    assert_eq!(second.top, [(2, -0.3), (3, -0.4)]);
    let third = output.logprobs[2].as_ref().unwrap();
    assert_eq!(
        third.top,
        [(4, -0.5)],
        "one alternative, although the plan has two"
    );
}

#[test]
fn an_answer_without_logprobs_is_tokens_alone() {
    let mut plan = plan();
    plan.samples.truncate(1);
    let token_ids = 11_i32.to_le_bytes();
    let buffers = OutputBuffers {
        token_ids: &token_ids,
        ..OutputBuffers::default()
    };
    let output = Wanted::new(&plan, 1000).decode(9, &buffers).unwrap();
    assert_eq!((output.token_ids, output.logprobs), (vec![11], vec![]));
}

#[test]
fn a_buffer_that_does_not_fit_is_named() {
    let good: [&[u8]; 4] = [&[0; 8], &[0; 8], &[0; 16], &[0; 16]];
    let decode = |[token_ids, chosen_logprobs, top_ids, top_logprobs]: [&[u8]; 4]| {
        let buffers = OutputBuffers {
            token_ids,
            chosen_logprobs,
            top_ids,
            top_logprobs,
        };
        Wanted::new(&plan(), 1000).decode(9, &buffers)
    };
    decode(good).unwrap();
    let names = ["token_ids", "chosen_logprobs", "top_ids", "top_logprobs"];
    for (index, name) in names.into_iter().enumerate() {
        for wrong in [&[0; 7][..], &[], &[0; 20]] {
            let mut buffers = good;
            buffers[index] = wrong;
            let error = decode(buffers).unwrap_err();
            assert!(matches!(error, OutputError::Length { field, got, .. }
                if field == name && got == wrong.len()));
        }
    }
    let negative = bytes_of(&[1, -1_i32].map(i32::to_le_bytes));
    let mut buffers = good;
    buffers[0] = &negative;
    let error = decode(buffers).unwrap_err();
    assert_eq!(
        error.to_string(),
        "token_ids[1] is outside the vocabulary of 1000 tokens"
    );
}
