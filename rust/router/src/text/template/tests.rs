//! Templates in the style of the model families, and templates that mean no good.

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::*;

/// One rendering; `expected` is what transformers made of it (`testdata/chat_templates/render.py`).
#[derive(Deserialize)]
struct Case {
    template: String,
    messages: Vec<Json>,
    #[serde(default)]
    tools: Vec<Json>,
    #[serde(default)]
    template_kwargs: serde_json::Map<String, Json>,
    expected: String,
}

fn source(name: &str) -> &'static str {
    match name {
        "chatml" => include_str!("../../../testdata/chat_templates/chatml.jinja"),
        "llama3" => include_str!("../../../testdata/chat_templates/llama3.jinja"),
        "qwen3" => include_str!("../../../testdata/chat_templates/qwen3.jinja"),
        "mistral" => include_str!("../../../testdata/chat_templates/mistral.jinja"),
        name => panic!("no template {name}"),
    }
}

fn config() -> Json {
    json!({"bos_token": "<s>", "eos_token": {"content": "<|eot_id|>", "lstrip": false}, "pad_token": null})
}

/// The date in `render.py`.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_709_210_096)
}

fn render(template: &str, messages: &Json, kwargs: &Json) -> Result<String, ApiError> {
    let template = ChatTemplate::from_files(&config(), template).unwrap();
    let conversation = Conversation {
        messages: messages.as_array().unwrap(),
        tools: &[],
        template_kwargs: kwargs.as_object().unwrap(),
    };
    template.render(&conversation, now())
}

#[test]
fn renders_what_transformers_renders() {
    let cases = include_str!("../../../testdata/chat_templates/cases.json");
    let cases: Vec<Case> = serde_json::from_str(cases).unwrap();
    for (index, case) in cases.into_iter().enumerate() {
        let template = ChatTemplate::from_files(&config(), source(&case.template)).unwrap();
        let conversation = Conversation {
            messages: &case.messages,
            tools: &case.tools,
            template_kwargs: &case.template_kwargs,
        };
        let rendered = template.render(&conversation, now()).unwrap();
        assert_eq!(rendered, case.expected, "case {index}, {}", case.template);
    }
}

#[test]
fn the_template_comes_from_either_file() {
    let named = json!({"chat_template": [
        {"name": "tool_use", "template": "tools: {{ tools | length }}"},
        {"name": "default", "template": "plain: {{ tools }}"},
    ]});
    let template = ChatTemplate::from_files(&named, "").unwrap();
    let kwargs = serde_json::Map::new();
    let render = |tools: &[Json]| {
        let conversation = Conversation {
            messages: &[],
            tools,
            template_kwargs: &kwargs,
        };
        template.render(&conversation, now()).unwrap()
    };
    assert_eq!(render(&[]), "plain: None");
    assert_eq!(render(&[json!({})]), "tools: 1");
    let both = ChatTemplate::from_files(&named, "from the file").unwrap();
    let conversation = Conversation {
        messages: &[],
        tools: &[],
        template_kwargs: &kwargs,
    };
    assert_eq!(both.render(&conversation, now()).unwrap(), "from the file");
}

#[test]
fn a_model_without_a_template_offers_no_chat() {
    for config in [
        json!({}),
        json!({"chat_template": null}),
        json!({"chat_template": []}),
    ] {
        let error = ChatTemplate::from_files(&config, "").err().unwrap();
        assert_eq!(error, TemplateError::Missing);
        let error = ApiError::from(error);
        assert_eq!(
            (error.code, error.param.as_deref()),
            (ErrorCode::Unsupported, Some("messages"))
        );
    }
    let broken = ChatTemplate::from_files(&json!({}), "{% if %}")
        .err()
        .unwrap();
    assert!(matches!(broken, TemplateError::Broken(_)));
}

#[test]
fn variables_override_what_they_may() {
    let template = "{{ bos_token }}|{{ add_generation_prompt }}|{{ messages | length }}";
    let kwargs = json!({"bos_token": "B", "add_generation_prompt": false, "messages": [1, 2]});
    assert_eq!(
        render(template, &json!([{}]), &kwargs).unwrap(),
        "B|False|1"
    );
}

#[test]
fn refusals_repeat_the_author_and_never_the_client() {
    let refuse = |template: &str| {
        let error = render(
            template,
            &json!([{"role": "SECRET", "content": 5}]),
            &json!({}),
        )
        .unwrap_err();
        assert_eq!(error.param.as_deref(), Some("messages"));
        assert!(!error.message.contains("SECRET"), "{}", error.message);
        error
    };
    let error = refuse("{{ raise_exception('Roles must alternate') }}");
    assert!(
        error.message.contains("Roles must alternate"),
        "{}",
        error.message
    );
    assert_eq!(error.code, ErrorCode::InvalidRequest);
    refuse("{{ raise_exception('No role ' + messages[0].role) }}");
    refuse("{{ messages[0].role.nothing.deeper }}");
    refuse("{{ messages[0].role | int }}");
    let error = refuse("{{ messages[0].role | no_such_filter }}");
    assert_eq!(error.code, ErrorCode::Unsupported);
}

#[test]
fn templates_run_within_bounds() {
    let endless =
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
    let error = render(endless, &json!([]), &json!({})).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidRequest);
    let large = "{% for a in range(100000) %}{{ messages[0] }}{% endfor %}";
    let error = render(large, &json!(["x".repeat(1000)]), &json!({})).unwrap_err();
    assert!(error.message.contains("too long"), "{}", error.message);
    let deep = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}";
    assert!(render(deep, &json!([]), &json!({})).is_err());
}

#[test]
fn generation_tags_print_their_body() {
    let source =
        "a {%- generation -%} b {%- endgeneration %}c{% set generations = 1 %}{{ generations }}";
    assert_eq!(render(source, &json!([]), &json!({})).unwrap(), "abc1");
}
