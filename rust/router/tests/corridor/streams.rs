//! What a client gets of what a worker sends.

use orchestra_core::step::{FinishReason, TokenLogprobs};
use orchestra_proto::v1;
use orchestra_router::request::{GenerateInput, Prompt, SamplingPatch};
use serde_json::json;

use crate::{
    fixtures::{BOS, END},
    support::{TestRouter, bytes, collect, input, limits, next, text, tokens},
};

#[tokio::test]
async fn tokens_become_text_as_they_come() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let mut stream = router.generate(text("hello world")).await.unwrap();
    assert_eq!(stream.prompt_token_ids(), [BOS, 259, 264]);
    assert_eq!(stream.prompt_tokens(), 3);
    assert_eq!(stream.model().decode_token(264), " world");

    let start = worker.start().await;
    assert_eq!(start.prompt_token_ids, [BOS, 259, 264]);
    assert_eq!((start.weights_epoch, start.output_token_ids.len()), (7, 0));
    let mut first = tokens(start.sequence_id, 0, &[97, 0xE4]);
    first.cached_tokens = 2;
    worker.output(first).await;
    let chunk = next(&mut stream).await.unwrap();
    assert_eq!(
        (chunk.text.as_str(), chunk.token_ids),
        ("a", vec![97, 0xE4])
    );
    worker.tokens(start.sequence_id, 2, &[0xB8, 0xAD]).await;
    assert_eq!(next(&mut stream).await.unwrap().text, "中");
    worker
        .finish(start.sequence_id, 4, &[98, END], v1::FinishReason::Stop)
        .await;
    let chunk = next(&mut stream).await.unwrap();
    let finish = chunk.finish.unwrap();
    assert_eq!((chunk.text.as_str(), chunk.token_ids), ("b", vec![98, END]));
    assert_eq!(finish.reason, FinishReason::Stop);
    assert_eq!((finish.completion_tokens, finish.cached_tokens), (6, 2));
    assert!(collect(stream, 0).await.unwrap().is_empty());

    assert_eq!(router.metric("orchestra_generation_tokens_total"), Some(6));
    assert_eq!(
        router.metric("orchestra_prefix_cache_hit_tokens_total"),
        Some(2)
    );
    assert_eq!(
        router.metric("orchestra_requests_finished_total{reason=\"stop\"}"),
        Some(1)
    );
    assert_eq!(
        router.metric("orchestra_time_to_first_token_seconds_count"),
        Some(1)
    );
    assert_eq!(router.metric("orchestra_requests_running"), Some(0));
}

#[tokio::test]
async fn a_stop_token_ends_the_text_before_it() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let stream = router.generate(text("x")).await.unwrap();
    let start = worker.start().await;
    // An ordinary token that the request named as its stop token, after half a character.
    worker
        .finish(
            start.sequence_id,
            0,
            &[97, 0xE4, 33],
            v1::FinishReason::Stop,
        )
        .await;
    let answer = &collect(stream, 1).await.unwrap()[0];
    assert_eq!(answer.text, "a\u{FFFD}");
    assert_eq!(answer.token_ids, [97, 0xE4, 33]);
}

#[tokio::test]
async fn chat_is_rendered_and_told_from_text() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let prompt = Prompt::Chat {
        messages: vec![json!({"role": "user", "content": "hi"})],
        tools: Vec::new(),
        template_kwargs: serde_json::Map::new(),
    };
    let stream = router.generate(input(prompt)).await.unwrap();
    let expected = [bytes("user:hi"), vec![END], bytes(">")].concat();
    assert_eq!(stream.prompt_token_ids(), expected);
    assert_eq!(worker.start().await.prompt_token_ids, expected);
}

#[tokio::test]
async fn choices_differ_in_their_seed_and_interleave() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let request = GenerateInput { n: 3, ..text("x") };
    let stream = router.generate(request).await.unwrap();
    let mut starts = Vec::new();
    for _ in 0..3 {
        starts.push(worker.start().await);
    }
    let seeds: Vec<_> = starts
        .iter()
        .map(|start| start.sampling.as_ref().unwrap().seed())
        .collect();
    assert_eq!(seeds, [42, 43, 44]);
    for (letter, start) in (0..3_u32).zip(&starts).rev() {
        worker.tokens(start.sequence_id, 0, &[97 + letter]).await;
    }
    for (letter, start) in (0..).zip(&starts) {
        worker
            .finish(
                start.sequence_id,
                1,
                &[65 + letter],
                v1::FinishReason::Length,
            )
            .await;
    }
    let answers = collect(stream, 3).await.unwrap();
    let texts: Vec<_> = answers.iter().map(|answer| answer.text.as_str()).collect();
    assert_eq!(texts, ["aA", "bB", "cC"]);
    assert!(
        answers
            .iter()
            .all(|answer| answer.finish == Some(FinishReason::Length))
    );
    assert_eq!(
        router.metric("orchestra_requests_finished_total{reason=\"length\"}"),
        Some(3)
    );
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_the_sequence_on_its_worker() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let request = GenerateInput {
        stop: vec!["</s>".to_owned(), "END".to_owned()],
        ..text("x")
    };
    let mut stream = router.generate(request).await.unwrap();
    let start = worker.start().await;
    worker.tokens(start.sequence_id, 0, &bytes("ok <")).await;
    let chunk = next(&mut stream).await.unwrap();
    assert_eq!((chunk.text.as_str(), chunk.token_ids.len()), ("ok ", 4));
    worker.tokens(start.sequence_id, 4, &bytes("E")).await;
    assert_eq!(next(&mut stream).await.unwrap().text, "<");
    // What follows the stop string in the same step is cut off, text and tokens.
    worker
        .tokens(start.sequence_id, 5, &bytes("ND of it"))
        .await;
    let chunk = next(&mut stream).await.unwrap();
    let finish = chunk.finish.unwrap();
    assert_eq!((chunk.text.as_str(), chunk.token_ids), ("", bytes("ND")));
    assert_eq!(
        (finish.reason, finish.stop_string.as_deref()),
        (FinishReason::Stop, Some("END"))
    );
    assert_eq!(finish.completion_tokens, 7);
    assert_eq!(worker.abort().await, start.sequence_id);
    assert!(collect(stream, 0).await.unwrap().is_empty());
}

#[tokio::test]
async fn held_back_text_comes_with_the_end() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let request = GenerateInput {
        stop: vec!["stop".to_owned()],
        ..text("x")
    };
    let stream = router.generate(request).await.unwrap();
    let start = worker.start().await;
    worker.tokens(start.sequence_id, 0, &bytes("non-st")).await;
    worker
        .finish(start.sequence_id, 6, &bytes("o"), v1::FinishReason::Length)
        .await;
    let answer = &collect(stream, 1).await.unwrap()[0];
    assert_eq!(
        (answer.text.as_str(), answer.stop_string.as_deref()),
        ("non-sto", None)
    );
}

#[tokio::test]
async fn logprobs_pass_through_where_asked_for() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let mut request = text("x");
    request.sampling.logprobs = Some(2);
    let mut stream = router.generate(request).await.unwrap();
    let start = worker.start().await;
    assert_eq!(start.sampling.as_ref().unwrap().logprobs, Some(2));
    let pair = |token_id, logprob| v1::TokenLogprob { token_id, logprob };
    let mut output = tokens(start.sequence_id, 0, &[97]);
    output.logprobs = vec![v1::TokenLogprobs {
        chosen: Some(pair(97, -0.5)),
        top: vec![pair(97, -0.5), pair(98, f32::NEG_INFINITY)],
    }];
    worker.output(output).await;
    let chunk = next(&mut stream).await.unwrap();
    // JSON has no infinity.
    let expected = TokenLogprobs {
        chosen: -0.5,
        top: vec![(97, -0.5), (98, -9999.0)],
    };
    assert_eq!(chunk.logprobs, [expected]);
}

#[tokio::test]
async fn the_client_s_sampling_goes_before_the_model_s_and_that_before_ours() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let mut request = text("x");
    request.sampling = SamplingPatch {
        top_k: Some(3),
        ..SamplingPatch::default()
    };
    let stream = router.generate(request).await.unwrap();
    let sampling = worker.start().await.sampling.unwrap();
    assert_eq!(sampling.top_k, Some(3), "the client's");
    assert_eq!(sampling.temperature, Some(0.5), "generation_config.json's");
    assert_eq!(
        sampling.top_p,
        Some(1.0),
        "ours, because the file's is out of range"
    );
    assert_eq!(sampling.max_tokens, Some(4096 - 2), "up to the context");
    assert!(sampling.seed.is_some() && sampling.min_p.is_some());
    assert_eq!(stream.sampling().seed, sampling.seed());
}

#[tokio::test]
async fn dropping_the_stream_ends_every_sequence_at_once() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let mut stream = router
        .generate(GenerateInput { n: 2, ..text("x") })
        .await
        .unwrap();
    let (first, second) = (worker.start().await, worker.start().await);
    worker.tokens(first.sequence_id, 0, &[97]).await;
    next(&mut stream).await.unwrap();
    drop(stream);
    let mut aborted = [worker.abort().await, worker.abort().await];
    aborted.sort_unstable();
    assert_eq!(aborted, [first.sequence_id, second.sequence_id]);
    assert_eq!(
        router.metric("orchestra_requests_finished_total{reason=\"abort\"}"),
        Some(2)
    );
    // Tokens that were on their way are nobody's.
    worker.tokens(first.sequence_id, 1, &[98]).await;
    let _next = router.generate(text("y")).await.unwrap();
    assert_eq!(worker.start().await.prompt_token_ids, [BOS, 121]);
}

#[tokio::test]
async fn a_slow_reader_holds_up_nobody() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let mut slow = text("slow");
    slow.sampling.max_tokens = Some(4000);
    let slow = router.generate(slow).await.unwrap();
    let slow_start = worker.start().await;
    for index in 0..3999 {
        worker
            .tokens(slow_start.sequence_id, index, &[97 + index % 26])
            .await;
    }
    worker
        .finish(
            slow_start.sequence_id,
            3999,
            &[33],
            v1::FinishReason::Length,
        )
        .await;
    // Nobody has read a token of the first stream; the second works.
    let quick = router.generate(text("quick")).await.unwrap();
    let quick_start = worker.start().await;
    worker
        .finish(
            quick_start.sequence_id,
            0,
            &bytes("yes"),
            v1::FinishReason::Length,
        )
        .await;
    assert_eq!(collect(quick, 1).await.unwrap()[0].text, "yes");
    assert_eq!(collect(slow, 1).await.unwrap()[0].token_ids.len(), 4000);
}
