//! Steps whose arrays lie: each is refused by name, and the step before stays. What attention computes is compared with
//! the textbook's in `tests/worker/test_attention.py`.

#![expect(unsafe_code, reason = "hands tensors over")]
#![expect(clippy::unwrap_used, reason = "a test fails where it unwraps")]

mod pairs;
mod together;

use orchestra_kernels::{
    Attention, AttentionConfig, Processor, Rule, StepArrays, attention::Tensors, bf16,
};

const CONFIG: AttentionConfig = AttentionConfig {
    num_heads: 2,
    num_kv_heads: 1,
    head_dim: 8,
    block_size: 8,
    num_blocks: 4,
};

/// Two sequences: one decodes its 9th token, one begins with three.
const STEP: StepArrays<'static> = StepArrays {
    slot_mapping: &[8, 16, 17, 18],
    query_start: &[0, 1, 4],
    context_lens: &[9, 3],
    block_tables: &[3, 1, 2, 0],
};

#[test]
fn arrays_that_point_outside_are_refused_by_name() {
    let attention = Attention::<f32>::new(CONFIG).unwrap();
    let refused = |step: StepArrays<'_>| attention.prepare(&step, 2).unwrap_err().field;
    let bad_slots: [&[i32]; 2] = [&[8, 16, 17, 32], &[8, 16, 17, -1]];
    for slot_mapping in bad_slots {
        assert_eq!(
            refused(StepArrays {
                slot_mapping,
                ..STEP
            }),
            "slot_mapping"
        );
    }
    let bad_starts: [&[i32]; 5] = [&[0, 1, 5], &[0, 1, 3], &[1, 1, 4], &[0, 4], &[]];
    for query_start in bad_starts {
        assert_eq!(
            refused(StepArrays {
                query_start,
                ..STEP
            }),
            "query_start"
        );
    }
    let bad_tables: [&[i32]; 4] = [&[3, 1, 2, 4], &[3, 1, 2, -1], &[3, 1, 2], &[3, 2]];
    for block_tables in bad_tables {
        assert_eq!(
            refused(StepArrays {
                block_tables,
                ..STEP
            }),
            "block_tables"
        );
    }
    let bad_contexts: [&[i32]; 3] = [&[9, 2], &[0, 3], &[9, 33]];
    for context_lens in bad_contexts {
        assert_eq!(
            refused(StepArrays {
                context_lens,
                ..STEP
            }),
            "context_lens"
        );
    }
    // A later sequence that begins before the one before it has ended.
    let crossed = StepArrays {
        query_start: &[0, 2, 1, 4],
        context_lens: &[9, 3, 3],
        block_tables: &[3, 1, 2, 0, 2, 0],
        ..STEP
    };
    assert_eq!(refused(crossed), "context_lens");
    attention.prepare(&STEP, 2).unwrap();
}

#[test]
fn shapes_that_vectors_do_not_fill_are_refused_by_name() {
    let field = |config| match Attention::<f32>::new(config).map(drop) {
        Err(error) => error.field,
        Ok(()) => panic!("accepted"),
    };
    let head_dim = 12;
    assert_eq!(field(AttentionConfig { head_dim, ..CONFIG }), "head_dim");
    let head_dim = 1032;
    assert_eq!(field(AttentionConfig { head_dim, ..CONFIG }), "head_dim");
    let block_size = 4;
    assert_eq!(
        field(AttentionConfig {
            block_size,
            ..CONFIG
        }),
        "block_size"
    );
    let num_kv_heads = 0;
    assert_eq!(
        field(AttentionConfig {
            num_kv_heads,
            ..CONFIG
        }),
        "num_heads"
    );
    let num_kv_heads = 3;
    assert_eq!(
        field(AttentionConfig {
            num_kv_heads,
            ..CONFIG
        }),
        "num_heads"
    );
    let num_blocks = 1 << 30;
    assert_eq!(
        field(AttentionConfig {
            num_blocks,
            ..CONFIG
        }),
        "num_blocks"
    );
}

#[test]
fn a_refused_step_leaves_the_one_before() {
    let attention = Attention::<f32>::new(CONFIG).unwrap();
    attention.prepare(&STEP, 2).unwrap();
    let slot_mapping = &[99; 4];
    attention
        .prepare(
            &StepArrays {
                slot_mapping,
                ..STEP
            },
            2,
        )
        .unwrap_err();
    let query = vec![1.0_f32; 4 * 16];
    let key_value: Vec<f32> = (0..4 * 16).map(|number| number as f32).collect();
    let mut cache = vec![0.0_f32; 4 * 2 * 8 * 8];
    let mut output = vec![f32::NAN; 4 * 16];
    let tensors = Tensors {
        query: query.as_ptr(),
        query_stride: 16,
        key_value: key_value.as_ptr(),
        key_value_stride: 16,
        cache: cache.as_mut_ptr(),
        output: output.as_mut_ptr(),
    };
    // SAFETY: the vectors have the sizes of `CONFIG` and of the four tokens of `STEP`.
    unsafe { attention.forward(&Rule::default(), &tensors, 1) };
    // The first token of the second sequence sees itself alone: both of its heads get its value.
    assert_eq!(output[16..24], key_value[24..32]);
    assert_eq!(output[24..32], key_value[24..32]);
    // Block 2 has the keys of the new sequence first, then its values.
    assert_eq!(cache[2 * 128..][..8], key_value[16..24]);
    assert_eq!(cache[2 * 128 + 64 + 2 * 8..][..8], key_value[56..64]);
}

/// What a token that sees 40 others gets, on a processor of that kind; heads of `head_dim`.
fn attended(processor: Processor, head_dim: usize) -> Vec<f32> {
    let config = AttentionConfig {
        num_heads: 6,
        num_kv_heads: 2,
        head_dim,
        num_blocks: 6,
        ..CONFIG
    };
    let attention = Attention::new(config).unwrap().on(processor);
    let wave = |number: usize| (number as f32 * 0.37).sin();
    let mut cache: Vec<f32> = (0..6 * 2 * 2 * 8 * head_dim).map(wave).collect();
    let query: Vec<f32> = (7..7 + 6 * head_dim).map(wave).collect();
    let key_value: Vec<f32> = (3..3 + 4 * head_dim).map(wave).collect();
    let step = StepArrays {
        slot_mapping: &[8],
        query_start: &[0, 1],
        context_lens: &[41],
        block_tables: &[5, 0, 3, 2, 4, 1],
    };
    attention.prepare(&step, 2).unwrap();
    let mut output = vec![f32::NAN; query.len()];
    let tensors = Tensors {
        query: query.as_ptr(),
        query_stride: query.len(),
        key_value: key_value.as_ptr(),
        key_value_stride: key_value.len(),
        cache: cache.as_mut_ptr(),
        output: output.as_mut_ptr(),
    };
    // SAFETY: the vectors have the sizes of the configuration and of one token.
    unsafe { attention.forward(&Rule::default(), &tensors, 1) };
    output
}

#[test]
fn every_kind_of_processor_gives_the_same_but_for_rounding() {
    // With numbers left over behind the last sixteen, and without; several vectors of sums, and one.
    for head_dim in [8, 16, 24, 64, 72, 128, 200] {
        let plain = attended(Processor::PORTABLE, head_dim);
        for processor in Processor::all_here() {
            for (number, exact) in attended(processor, head_dim).iter().zip(&plain) {
                assert!((number - exact).abs() < 1e-5, "{processor:?} {head_dim}");
            }
        }
    }
}

/// Numbers of bf16 from -1 to 1, the same for the same seed (`xorshift64*`, Vigna, 2016).
fn numbers(seed: u64, count: usize) -> Vec<u16> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let bits = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40;
        bits as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| bf16::narrow(next())).collect()
}
