//! Bad input: each kind is answered with its code and field, and reaches no worker.

use orchestra_core::ErrorCode;
use orchestra_proto::v1;
use orchestra_router::request::{GenerateInput, Prompt, SamplingPatch};
use serde_json::json;

use crate::support::{TestRouter, bytes, hello, input, limits, text};

fn with(change: impl FnOnce(&mut SamplingPatch)) -> GenerateInput {
    let mut request = text("x");
    change(&mut request.sampling);
    request
}

fn chat(content: &str) -> GenerateInput {
    input(Prompt::Chat {
        messages: vec![json!({"role": "user", "content": content})],
        tools: Vec::new(),
        template_kwargs: serde_json::Map::new(),
    })
}

type Case = (ErrorCode, &'static str, GenerateInput);

/// A router whose one worker takes 64 tokens refuses each case with its code and field; the first thing that the worker
/// hears of is the first good request.
async fn assert_refused(cases: Vec<Case>) {
    let router = TestRouter::start(limits()).await;
    let mut worker = router
        .attach_as(v1::WorkerHello {
            max_model_len: 64,
            ..hello("w0")
        })
        .await;
    for (index, (code, field, request)) in cases.into_iter().enumerate() {
        let error = router
            .generate(request)
            .await
            .err()
            .unwrap_or_else(|| panic!("case {index}"));
        let named = (error.code, error.param.as_deref());
        assert_eq!(named, (code, Some(field)), "case {index}: {error}");
        assert!(
            !error.message.contains("xxx"),
            "case {index} repeats the client: {error}"
        );
    }
    assert_eq!(router.metric("orchestra_requests_running"), Some(0));
    let longest = with(|sampling| sampling.max_tokens = Some(62));
    let _stream = router.generate(longest).await.unwrap();
    assert_eq!(worker.start().await.prompt_token_ids[1..], bytes("x"));
}

#[tokio::test]
async fn the_request_s_shape_is_checked() {
    let bad = ErrorCode::InvalidRequest;
    let unknown = GenerateInput {
        model: "none".to_owned(),
        ..text("x")
    };
    let stop = |stop| GenerateInput { stop, ..text("x") };
    assert_refused(vec![
        (ErrorCode::ModelNotFound, "model", unknown),
        (bad, "n", GenerateInput { n: 0, ..text("x") }),
        (bad, "n", GenerateInput { n: 33, ..text("x") }),
        (bad, "stop", stop(vec!["s".to_owned(); 17])),
        (bad, "stop", stop(vec![String::new()])),
        (bad, "stop", stop(vec!["s".repeat(257)])),
        (
            bad,
            "cache_salt",
            GenerateInput {
                cache_salt: "s".repeat(257),
                ..text("x")
            },
        ),
        (bad, "prompt", text("")),
        (
            bad,
            "messages",
            input(Prompt::Chat {
                messages: Vec::new(),
                tools: Vec::new(),
                template_kwargs: serde_json::Map::new(),
            }),
        ),
        (bad, "prompt", input(Prompt::TokenIds(Vec::new()))),
        (bad, "prompt", input(Prompt::TokenIds(vec![1, 2, 9999]))),
    ])
    .await;
}

#[tokio::test]
async fn sampling_values_are_checked() {
    let bad = ErrorCode::InvalidRequest;
    assert_refused(vec![
        (
            bad,
            "max_tokens",
            with(|sampling| sampling.max_tokens = Some(0)),
        ),
        (
            bad,
            "temperature",
            with(|sampling| sampling.temperature = Some(-0.1)),
        ),
        (
            bad,
            "temperature",
            with(|sampling| sampling.temperature = Some(f32::NAN)),
        ),
        (bad, "top_p", with(|sampling| sampling.top_p = Some(0.0))),
        (
            bad,
            "logprobs",
            with(|sampling| sampling.logprobs = Some(21)),
        ),
        (
            bad,
            "stop_token_ids",
            with(|sampling| sampling.stop_token_ids = vec![5, 100_000]),
        ),
        (
            bad,
            "logit_bias",
            with(|sampling| sampling.logit_bias = vec![(100_000, 1.0)]),
        ),
    ])
    .await;
}

#[tokio::test]
async fn what_does_not_fit_the_context_is_refused() {
    let long = ErrorCode::ContextTooLong;
    // By far too long is found without tokenising.
    let by_far = "x".repeat(10_000);
    assert_refused(vec![
        (long, "prompt", text(&"x".repeat(63))),
        (
            long,
            "prompt",
            with(|sampling| sampling.max_tokens = Some(63)),
        ),
        (long, "prompt", text(&by_far)),
        (long, "messages", chat(&"x".repeat(100))),
        (long, "messages", chat(&by_far)),
        (long, "prompt", input(Prompt::TokenIds(vec![1; 64]))),
    ])
    .await;
}

#[tokio::test]
async fn messages_tell_the_numbers() {
    let router = TestRouter::start(limits()).await;
    let _worker = router
        .attach_as(v1::WorkerHello {
            max_model_len: 64,
            ..hello("w0")
        })
        .await;
    let message = async |request| router.generate(request).await.err().unwrap().message;
    assert_eq!(
        message(with(|sampling| sampling.max_tokens = Some(63))).await,
        "prompt has 2 tokens and max_tokens is 63, together more than the model's context of 64"
    );
    assert_eq!(
        message(text(&"x".repeat(80))).await,
        "prompt has 81 tokens, the model's context holds 64 with the output"
    );
    assert_eq!(
        message(input(Prompt::TokenIds(vec![1, 275]))).await,
        "prompt[1] must be below 275, the size of the vocabulary"
    );
}

#[tokio::test]
async fn a_model_without_a_template_completes_and_does_not_chat() {
    let router = TestRouter::start(limits()).await;
    let files = v1::ModelFiles {
        tokenizer_config_json: Vec::new(),
        ..crate::support::model_files()
    };
    let mut worker = router.dial(hello("w0"), files).await.unwrap();
    crate::support::eventually("the worker", || router.state.is_ready()).await;
    let error = router.generate(chat("hi")).await.err().unwrap();
    assert_eq!(
        (error.code, error.param.as_deref()),
        (ErrorCode::Unsupported, Some("messages"))
    );
    let _stream = router.generate(text("hi")).await.unwrap();
    worker.start().await;
}

#[tokio::test]
async fn long_text_is_tokenised_like_short_text() {
    let (router, _worker) = TestRouter::with_worker(limits()).await;
    let long = "hello world ".repeat(300);
    let stream = router.generate(text(&long)).await.unwrap();
    let short = router.generate(text("hello world ")).await.unwrap();
    let pattern = &short.prompt_token_ids()[1..];
    // "hello world" and the space before the next word.
    assert_eq!(stream.prompt_token_ids()[1..=pattern.len()], *pattern);
    assert_eq!(stream.prompt_tokens() as usize, 1 + 300 * pattern.len());
}
