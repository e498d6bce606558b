//! The step scheduler's scenario scripts, `tests/testdata/step/*.txt`.
//!
//! A script is a list of cases, each some commands, a line `----`, and what they print; a blank line ends a case,
//! `#` begins a comment. `UPDATE=1 cargo test -p orchestra-core --test step_scenarios` writes what is printed now
//! into the scripts, to be reviewed as a diff.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod session;

use std::{fmt::Write as _, fs, path::Path};

use session::Session;

#[test]
fn scripts_print_what_they_say() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/testdata/step");
    let mut paths: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|it| it.unwrap().path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty());
    let update = std::env::var_os("UPDATE").is_some();
    let mut failures = String::new();
    for path in paths {
        let script = fs::read_to_string(&path).unwrap();
        let now = play(&script);
        if update {
            fs::write(&path, now).unwrap();
        } else if now != script {
            let first = now
                .lines()
                .zip(script.lines())
                .position(|(now, then)| now != then);
            let line = first.unwrap_or(script.lines().count().min(now.lines().count()));
            let (is, was) = (now.lines().nth(line), script.lines().nth(line));
            let name = path.display();
            let _ = writeln!(failures, "{name}:{}\n  is  {is:?}\n  was {was:?}", line + 1);
        }
    }
    assert!(
        failures.is_empty(),
        "UPDATE=1 accepts the new output\n{failures}"
    );
}

/// The script with the output that its commands print now.
fn play(script: &str) -> String {
    let mut session = None;
    let mut now = String::new();
    let mut printed = String::new();
    let mut is_output = false;
    for line in script.lines() {
        if is_output {
            // The old output goes, up to the blank line behind it.
            is_output = !line.is_empty();
            if is_output {
                continue;
            }
        } else if line == "----" {
            let _ = writeln!(now, "----\n{}", printed.trim_end());
            printed.clear();
            is_output = true;
            continue;
        } else if let Some(settings) = line.strip_prefix("config ") {
            session = Some(Session::new(settings));
        } else if !line.is_empty() && !line.starts_with('#') {
            let session = session
                .as_mut()
                .unwrap_or_else(|| panic!("no config before {line}"));
            printed.push_str(&session.run(line));
        }
        let _ = writeln!(now, "{line}");
    }
    assert!(
        printed.is_empty(),
        "the last commands have no ----:\n{printed}"
    );
    now
}
