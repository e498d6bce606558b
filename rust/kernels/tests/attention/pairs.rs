//! Attention in bf16, on everything that computes it here: against the portable twin, and against itself with the prompt
//! cut elsewhere.

use orchestra_kernels::{
    Attention, AttentionConfig, Processor, Rule, StepArrays, attention::Tensors, bf16,
};
use proptest::prelude::*;

/// Blocks of the cache lie in this order, and between them some that are nobody's.
const STRIDE: i32 = 3;

#[derive(Clone, Copy, Debug)]
struct Case {
    group: usize,
    head_dim: usize,
    block_size: usize,
    tokens: usize,
    rule: Rule,
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (
        prop::sample::select(vec![1, 2, 3, 4, 5, 8, 16, 17, 40]),
        // Some that tiles do not fit.
        prop::sample::select(vec![8, 24, 32, 64, 80, 96, 128]),
        prop::sample::select(vec![8, 16, 24, 32, 48]),
        1_usize..200,
    );
    let rules = (
        prop::option::of(1_usize..150),
        prop::option::of(0.05_f32..1.0),
        prop::option::of(5.0_f32..40.0),
    );
    (sizes, rules).prop_map(|((group, head_dim, block_size, tokens), rule)| {
        let (window, scale, soft_cap) = rule;
        Case {
            group,
            head_dim,
            block_size,
            tokens,
            rule: Rule {
                window,
                scale,
                soft_cap,
            },
        }
    })
}

impl Case {
    fn config(&self) -> AttentionConfig {
        AttentionConfig {
            num_heads: 2 * self.group,
            num_kv_heads: 2,
            head_dim: self.head_dim,
            block_size: self.block_size,
            num_blocks: STRIDE as usize * self.tokens.div_ceil(self.block_size),
        }
    }

    /// Attention over all tokens, the steps ending at `ends`: `[tokens, heads, head_dim]`.
    fn attend(&self, attention: &Attention<u16>, ends: &[usize], seed: u64) -> Vec<u16> {
        let config = self.config();
        let query_size = config.num_heads * self.head_dim;
        let key_value_size = 2 * config.num_kv_heads * self.head_dim;
        let query = super::numbers(seed, self.tokens * query_size);
        let key_value = super::numbers(!seed, self.tokens * key_value_size);
        // Whatever lies where nothing was written yet: it must not be seen.
        let cache_size = config.num_blocks * self.block_size * key_value_size;
        let mut cache = vec![bf16::narrow(f32::NAN); cache_size];
        let mut output = vec![0; self.tokens * query_size];
        let blocks: Vec<i32> = (0..self.tokens.div_ceil(self.block_size) as i32)
            .map(|block| block * STRIDE + 1)
            .collect();
        let mut first = 0;
        for &end in ends {
            let slots: Vec<i32> = (first..end)
                .map(|token| {
                    let (block, place) = (token / self.block_size, token % self.block_size);
                    blocks[block] * self.block_size as i32 + place as i32
                })
                .collect();
            let step = StepArrays {
                slot_mapping: &slots,
                query_start: &[0, (end - first) as i32],
                context_lens: &[end as i32],
                block_tables: &blocks,
            };
            attention.prepare(&step, 2).unwrap();
            let tensors = Tensors {
                query: query[first * query_size..].as_ptr(),
                query_stride: query_size,
                key_value: key_value[first * key_value_size..].as_ptr(),
                key_value_stride: key_value_size,
                cache: cache.as_mut_ptr(),
                output: output[first * query_size..].as_mut_ptr(),
            };
            // SAFETY: the vectors have the sizes of the configuration, and those of the step's tokens from here on.
            unsafe { attention.forward(&self.rule, &tensors, 1) };
            first = end;
        }
        output
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn rounding_is_all_that_differs_from_the_portable_twin(case in cases(), seed in any::<u64>()) {
        let all = [case.tokens];
        let here = Attention::new(case.config()).unwrap();
        let plain = Attention::new(case.config()).unwrap().on(Processor::PORTABLE);
        let plain = case.attend(&plain, &all, seed);
        for (number, exact) in case.attend(&here, &all, seed).into_iter().zip(plain) {
            let (number, exact) = (bf16::widen(number), bf16::widen(exact));
            // Weights and results are rounded to eight bits each; values are below one.
            prop_assert!((number - exact).abs() <= 0.01, "{number} {exact}");
        }
    }

    #[test]
    fn how_a_prompt_is_cut_changes_no_bit(
        case in cases(),
        cuts in prop::collection::btree_set(1_usize..200, 0..6),
        seed in any::<u64>(),
    ) {
        let attention = Attention::new(case.config()).unwrap();
        let whole = case.attend(&attention, &[case.tokens], seed);
        let mut ends: Vec<usize> = cuts.into_iter().filter(|&cut| cut < case.tokens).collect();
        ends.push(case.tokens);
        prop_assert_eq!(&whole, &case.attend(&attention, &ends, seed));
        let one_by_one: Vec<usize> = (1..=case.tokens).collect();
        prop_assert_eq!(&whole, &case.attend(&attention, &one_by_one, seed));
    }
}
