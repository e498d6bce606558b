//! Several sequences in a step, whose tiles are cut otherwise than one's alone: no bit may change.

use orchestra_kernels::{
    Attention, AttentionConfig, Element, Rule, StepArrays, attention::Tensors, bf16,
};
use proptest::prelude::*;

/// Tokens of a sequence at the end of the step, and how many of them are new.
type Sequence = (usize, usize);

#[derive(Clone, Debug)]
struct Case {
    config: AttentionConfig,
    sequences: Vec<Sequence>,
    rule: Rule,
}

fn cases() -> impl Strategy<Value = Case> {
    let shapes = (
        1_usize..7,
        prop::sample::select(vec![1, 2, 3, 5, 16, 17]),
        prop::sample::select(vec![32, 64, 96]),
        prop::sample::select(vec![16, 32, 48, 128]),
    );
    // Decodes, with some tokens at once among them.
    let new = prop_oneof![4 => Just(1), 1 => 1_usize..20];
    let sequence = (0_usize..200, new).prop_map(|(before, new)| (before + new, new));
    let sequences = prop::collection::vec(sequence, 1..12);
    let window = prop::option::of(1_usize..150);
    (shapes, sequences, window).prop_map(|(shapes, sequences, window)| {
        let (num_kv_heads, group, head_dim, block_size) = shapes;
        let width = width(&sequences, block_size);
        Case {
            config: AttentionConfig {
                num_heads: num_kv_heads * group,
                num_kv_heads,
                head_dim,
                block_size,
                num_blocks: width * sequences.len(),
            },
            sequences,
            rule: Rule {
                window,
                ..Rule::default()
            },
        }
    })
}

fn numbers<E: Element>(seed: u64, count: usize) -> Vec<E> {
    let numbers = super::numbers(seed, count).into_iter();
    numbers.map(|bits| E::narrow(bf16::widen(bits))).collect()
}

/// Blocks of the longest.
fn width(sequences: &[Sequence], block_size: usize) -> usize {
    let blocks = |(context, _): &Sequence| context.div_ceil(block_size);
    sequences.iter().map(blocks).max().unwrap()
}

impl Case {
    /// What the new tokens of the `chosen` sequences get in one step.
    fn attend<E: Element>(&self, chosen: &[usize], seed: u64) -> Vec<E> {
        let config = &self.config;
        let width = width(&self.sequences, config.block_size);
        // Last block first, the sequences' side by side.
        let table = |sequence: usize| (0..width).map(move |at| sequence * width + width - 1 - at);
        let (mut slots, mut starts, mut tables) = (Vec::new(), vec![0], Vec::new());
        let (mut query, mut key_value) = (Vec::new(), Vec::new());
        let query_size = config.num_heads * config.head_dim;
        let key_value_size = 2 * config.num_kv_heads * config.head_dim;
        for &sequence in chosen {
            let (context, new) = self.sequences[sequence];
            let blocks: Vec<usize> = table(sequence).collect();
            slots.extend((context - new..context).map(|token| {
                let block = blocks[token / config.block_size];
                (block * config.block_size + token % config.block_size) as i32
            }));
            starts.push(slots.len() as i32);
            tables.extend(blocks.into_iter().map(|block| block as i32));
            let seed = seed ^ (sequence as u64 + 1) << 8;
            query.extend(numbers::<E>(seed, new * query_size));
            key_value.extend(numbers::<E>(!seed, new * key_value_size));
        }
        let contexts: Vec<i32> = chosen
            .iter()
            .map(|&sequence| self.sequences[sequence].0 as i32)
            .collect();
        let step = StepArrays {
            slot_mapping: &slots,
            query_start: &starts,
            context_lens: &contexts,
            block_tables: &tables,
        };
        let attention = Attention::<E>::new(*config).unwrap();
        attention.prepare(&step, 1).unwrap();
        let cache_size = config.num_blocks * config.block_size * key_value_size;
        let mut cache = numbers::<E>(seed, cache_size);
        let mut output = vec![E::narrow(f32::NAN); slots.len() * query_size];
        let tensors = Tensors {
            query: query.as_ptr(),
            query_stride: query_size,
            key_value: key_value.as_ptr(),
            key_value_stride: key_value_size,
            cache: cache.as_mut_ptr(),
            output: output.as_mut_ptr(),
        };
        // SAFETY: the vectors have the sizes of the configuration and of the step's tokens.
        unsafe { attention.forward(&self.rule, &tensors, 1) };
        output
    }
}

impl Case {
    /// Whether each sequence gets in a step of its own what it gets beside all others.
    fn is_the_same_apart<E: Element>(&self, seed: u64) -> bool {
        let all: Vec<usize> = (0..self.sequences.len()).collect();
        let apart = all.iter().flat_map(|&one| self.attend::<E>(&[one], seed));
        let bits = |number: E| number.widen().to_bits();
        let together = self.attend::<E>(&all, seed).into_iter();
        apart.map(bits).eq(together.map(bits))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_else_is_in_the_step_changes_no_bit(case in cases(), seed in any::<u64>()) {
        prop_assert!(case.is_the_same_apart::<u16>(seed));
        prop_assert!(case.is_the_same_apart::<f32>(seed));
    }
}
