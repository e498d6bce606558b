//! Where the binary's settings come from, and what it says of ones that it cannot use.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// A file of this test's own.
pub(crate) fn file(name: &str, text: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, text).unwrap();
    path
}

fn router(config: &Path, flags: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_orchestra-router"))
        .env_clear()
        .envs(variables.iter().copied())
        .arg("--config")
        .arg(config)
        .args(flags)
        .output()
        .unwrap()
}

fn printed(config: &Path, flags: &[&str], variables: &[(&str, &str)]) -> String {
    let output = router(config, &[&["--print-config"], flags].concat(), variables);
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{complaint}");
    String::from_utf8(output.stdout).unwrap()
}

fn complaints(config: &Path, flags: &[&str], variables: &[(&str, &str)]) -> String {
    let output = router(config, flags, variables);
    assert_eq!(output.status.code(), Some(64));
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_flag_wins_over_the_environment_over_the_file_over_the_default() {
    let keys = file("keys", "# ours\nsk-1\n\n sk-2 \n");
    let text = format!(
        "max_replays = 5\nlog = 'warn'\nhang_timeout = '7s'\napi_key = ['sk-3']\napi_key_file = {:?}\n",
        keys.display().to_string()
    );
    let config = file("layers.toml", &text);
    let variables = [("ORCHESTRA_LOG", "debug"), ("ORCHESTRA_HANG_TIMEOUT", "8s")];
    let printed = printed(&config, &["--hang-timeout", "9s"], &variables);
    for line in [
        "http = \"127.0.0.1:8000\" # default".to_owned(),
        format!("max_replays = 5 # {}:1", config.display()),
        "log = \"debug\" # env ORCHESTRA_LOG".to_owned(),
        "hang_timeout = \"9s\" # flag".to_owned(),
        format!("api_key = [\"***\"] # {}:4", config.display()),
    ] {
        assert!(printed.contains(&format!("{line}\n")), "{line}\n{printed}");
    }
    assert!(!printed.contains("sk-"), "{printed}");
}

#[test]
fn what_is_printed_reads_as_the_same_settings() {
    let config = file("empty.toml", "");
    let first = printed(&config, &["--max-body-size", "3MiB", "--log", "1"], &[]);
    let again = file("again.toml", &first);
    let values = |text: &str| -> Vec<String> {
        let value = |line: &str| line.split(" # ").next().unwrap().to_owned();
        text.lines().map(value).collect()
    };
    assert_eq!(values(&printed(&again, &[], &[])), values(&first));
    assert!(first.lines().count() > 15);
}

#[test]
fn everything_wrong_is_said_at_once_with_its_place() {
    let config = file(
        "wrong.toml",
        "max_connection = 9\nmax_replays = 'many'\nlog = ['a', 'b']\n[grpc]\nx = 1\n",
    );
    let variables = [
        ("ORCHESTRA_LOG_FORMAT", "xml"),
        ("ORCHESTRA_MAX_CONNECTIONS", "0"),
    ];
    let missing = ["--api-key-file", "/nowhere/keys"];
    let said = complaints(&config, &missing, &variables);
    let at = |line| format!("({}:{line})", config.display());
    for (beginning, end) in [
        (
            "max_connection: there is no such setting; did you mean max_connections? ",
            at(1),
        ),
        ("max_replays: invalid digit found in string ", at(2)),
        ("log: must be one value, not a list ", at(3)),
        (
            "grpc: must be a text, a number, true, false, or a list of these ",
            at(4),
        ),
        (
            "log_format: must be one of text, json ",
            "(env ORCHESTRA_LOG_FORMAT)".to_owned(),
        ),
        (
            "max_connections: must be at least 1 ",
            "(env ORCHESTRA_MAX_CONNECTIONS)".to_owned(),
        ),
        (
            "api_key_file: /nowhere/keys: ",
            "No such file or directory (os error 2)".to_owned(),
        ),
    ] {
        let line = format!("orchestra-router: {beginning}{end}\n");
        assert!(said.contains(&line), "{line}\n{said}");
    }
    assert_eq!(said.lines().count(), 7, "{said}");
}

#[test]
fn engines_are_tables_of_the_file() {
    let text =
        "[[engine]]\nurl = 'http://a:1'\napi_key = 'sk-engine'\n\n[[engine]]\nurl = 'http://b:1'\n";
    let config = file("engines.toml", text);
    let shown = printed(&config, &["--worker", "http://c:1"], &[]);
    let expected =
        "[[engine]] # file\nurl = \"http://a:1\"\napi_key = \"***\"\nmax_num_seqs = 256\n";
    assert!(shown.contains(expected), "{shown}");
    assert!(
        shown.contains("worker = [\"http://c:1\"] # flag\n"),
        "{shown}"
    );
    assert!(!shown.contains("sk-engine"));

    let text = "[[engine]]\nurl = 'https://a:1'\n[[engine]]\nurl = 'http://b:1'\nmodle = 'm'\n";
    let said = complaints(&file("wrong-engines.toml", text), &[], &[]);
    for (key, line) in [
        ("engine[0].url: ", 2),
        ("engine[1].modle: unknown field `modle`", 5),
    ] {
        let found = said.lines().find(|said| said.contains(key));
        let found = found.unwrap_or_else(|| panic!("{key}: {said}"));
        assert!(
            found.ends_with(&format!("wrong-engines.toml:{line})")),
            "{found}"
        );
    }
    let twice = file("twice.toml", "[[engine]]\nurl = 'http://a:1'\n");
    let said = complaints(&twice, &["--worker", "http://a:1"], &[]);
    assert!(
        said.contains("engine.url: http://a:1 is given twice"),
        "{said}"
    );
    let no_list = complaints(&file("no-list.toml", "engine = 3\n"), &[], &[]);
    assert!(
        no_list.contains("engine: must be tables, each begun by [[engine]]"),
        "{no_list}"
    );
}

#[test]
fn tenants_are_tables_of_the_file_and_their_keys_are_never_repeated() {
    let fine =
        "[[tenant]]\nname = 'a'\napi_keys = 'sk-1'\n[[tenant]]\nname = 'b'\napi_keys = ['sk-2']\n";
    let fine = file("tenants.toml", fine);
    assert_eq!(router(&fine, &["--check"], &[]).status.code(), Some(0));
    let twice = "[[tenant]]\nname = 'a'\n[[tenant]]\nname = 'a'\n";
    let said = complaints(&file("tenants-twice.toml", twice), &[], &[]);
    assert!(said.contains("is another tenant's too"), "{said}");
    let wrong = "[[tenant]]\nname = 'a'\napi_keys = 4711\n[[engine]]\nurl = 'http://a:1'\napi_key = 4711\n\
                 [[tenant]]\napi_keys = [4711]\n";
    let said = complaints(&file("tenants-wrong.toml", wrong), &[], &[]);
    for line in [
        "tenant[0].api_keys: must be a text or a list of texts",
        "tenant[1].api_keys: must be a text or a list of texts",
        "engine[0].api_key: must be a text",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    assert!(!said.contains("4711"), "{said}");
}

#[test]
fn a_check_says_by_its_status_whether_a_router_would_start() {
    let fine = file("fine.toml", "http = '127.0.0.1:0'\n");
    let output = router(&fine, &["--check"], &[]);
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout.is_empty() && output.stderr.is_empty());
    let wrong = file("check.toml", "http = 'nowhere'\n");
    assert!(complaints(&wrong, &["--check"], &[]).contains("http: invalid socket address"));
    let nowhere = Path::new("/nowhere/router.toml");
    assert!(complaints(nowhere, &["--check"], &[]).contains("config: /nowhere/router.toml: "));
    let broken = file("broken.toml", "http = \n");
    assert!(complaints(&broken, &["--check"], &[]).contains("broken.toml:1: "));
}

#[test]
fn the_file_may_be_named_by_the_environment() {
    let config = file("named.toml", "max_replays = 4\n");
    let output = Command::new(env!("CARGO_BIN_EXE_orchestra-router"))
        .env("ORCHESTRA_CONFIG", &config)
        .arg("--print-config")
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("max_replays = 4 # "), "{printed}");
}

#[test]
fn tenants_are_read_from_their_file_and_their_keys_are_never_shown() {
    let config = file("tenants-empty.toml", "");
    let good = file(
        "tenants.toml",
        "[[tenant]]\nname = 'search'\napi_keys = ['sk-search']\nmax_class = 'standard'\n",
    );
    let flags = |path: &Path| ["--tenants-file".to_owned(), path.display().to_string()];
    let good = flags(&good);
    let shown = printed(&config, &[&good[0], &good[1]], &[]);
    assert!(shown.contains("trust_tenant_header = false # default\n"));
    assert!(shown.contains("tenants_file = ") && !shown.contains("sk-search"));

    let wrong = file(
        "tenants-wrong.toml",
        "[[tenant]]\nname = 'a'\napi_keys = ['sk-secret']\nweight = 0\n\n[[tenant]]\nname = 'a'\n",
    );
    let wrong = flags(&wrong);
    let said = complaints(&config, &[&wrong[0], &wrong[1]], &[]);
    for line in [
        "tenants_file: tenant 1: weight must be 1 to 10000 (flag)\n",
        "tenants_file: tenant 2: name is another tenant's too (flag)\n",
    ] {
        assert!(said.contains(line), "{line}\n{said}");
    }
    let broken = file(
        "tenants-broken.toml",
        "[[tenant]]\napi_keys = ['sk-secret'\n",
    );
    let broken = flags(&broken);
    let also = complaints(&config, &[&broken[0], &broken[1]], &[]);
    assert!(also.contains("tenants_file: ") && also.contains("tenants-broken.toml:"));
    assert!(
        !said.contains("secret") && !also.contains("secret"),
        "{also}"
    );
}
