//! From a command line to settings: everything that is wrong is found before anything is opened.

use std::{ffi::OsString, fs, path::Path, path::PathBuf};

use clap::{CommandFactory as _, FromArgMatches as _, Parser, error::ErrorKind};
use orchestra_core::config::ConfigIssue;

use super::{
    RouterConfig, Secret, file,
    sources::{Layers, Setting, without_environment},
};
use crate::tenants;

/// The front of Orchestra: clients speak OpenAI HTTP or gRPC to it, workers attach to it.
#[derive(Debug, Parser)]
#[command(name = "orchestra-router", version, about)]
struct Cli {
    /// A TOML file with settings: each long flag is a key, with underscores for hyphens. SIGHUP reads it again.
    #[arg(
        id = "config_file",
        long = "config",
        value_name = "PATH",
        env = "ORCHESTRA_CONFIG"
    )]
    file: Option<PathBuf>,
    /// Print every setting in effect as TOML, each with where it comes from, and end.
    #[arg(long)]
    print_config: bool,
    /// Check the settings and end: 0 where they can be used, else 64.
    #[arg(long)]
    check: bool,
    /// Print one line of JSON with the addresses once they are bound.
    #[arg(long)]
    print_addresses: bool,
    #[command(flatten)]
    config: RouterConfig,
}

/// What the command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Run a router.
    Run {
        /// Print the bound addresses.
        print_addresses: bool,
    },
    /// Print the settings in effect.
    PrintConfig,
    /// Say whether the settings can be used.
    Check,
}

/// Settings, and where they come from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The settings.
    pub config: RouterConfig,
    /// What is to be done with them.
    pub task: Task,
    /// Each setting with its source, in the order of the help.
    pub settings: Vec<Setting>,
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The command line cannot be read, or asks for help.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// Settings that cannot be used, all of them.
    #[error("invalid configuration: {}", join(.0))]
    Config(Vec<ConfigIssue>),
}

pub(crate) fn join(issues: &[ConfigIssue]) -> String {
    let issues: Vec<_> = issues.iter().map(ToString::to_string).collect();
    issues.join("; ")
}

/// Reads the flags in `args`, which begin with the program's name, the environment, the file and the files of keys.
///
/// # Errors
/// A command line that cannot be read, or every setting that cannot be used.
pub fn load(args: &[OsString]) -> Result<Loaded, LoadError> {
    let command = Cli::command();
    let bare = without_environment(command.clone());
    let given = match bare.try_get_matches_from(args) {
        Ok(given) => given,
        // The help names the environment.
        Err(error) if error.kind() == ErrorKind::DisplayHelp => {
            return Err(command
                .try_get_matches_from(args)
                .err()
                .unwrap_or(error)
                .into());
        }
        Err(error) => return Err(error.into()),
    };
    let path = given.get_one::<PathBuf>("config_file").cloned();
    let path = path.or_else(|| std::env::var_os("ORCHESTRA_CONFIG").map(PathBuf::from));
    let name = path
        .as_deref()
        .map_or(String::new(), |path| path.display().to_string());

    let mut issues = Vec::new();
    let text = path.as_deref().map_or(Ok(String::new()), file::read);
    let text = text.unwrap_or_else(|issue| {
        issues.push(issue);
        String::new()
    });
    let mut document = file::Document::parse(&text, &name, &mut issues);
    let engines = document.take_list("engine", &mut issues);
    let tenants = document.take_list("tenant", &mut issues);
    let entries = document.entries(&mut issues);
    let layers = Layers::new(&command, &given, (&entries, &name), &mut issues);
    let matches = layers.command.clone().try_get_matches_from(args)?;
    let mut cli = Cli::from_arg_matches(&matches)?;
    cli.config.engines.listed = engines;
    cli.config.tenants = tenants;
    cli.config.read_key_files(&mut issues);
    if let Err(found) = cli.config.validate() {
        issues.extend(found.into_iter().map(|issue| {
            let source = layers.source_of(&issue.key);
            ConfigIssue::new(issue.key, format!("{} ({source})", issue.message))
        }));
    }
    if !issues.is_empty() {
        return Err(LoadError::Config(issues));
    }
    Ok(Loaded {
        task: cli.task(),
        settings: layers.settings(&command, &matches),
        config: cli.config,
    })
}

impl Cli {
    fn task(&self) -> Task {
        if self.check {
            Task::Check
        } else if self.print_config {
            Task::PrintConfig
        } else {
            Task::Run {
                print_addresses: self.print_addresses,
            }
        }
    }
}

impl RouterConfig {
    /// Adds the keys and tenants that are in files.
    fn read_key_files(&mut self, issues: &mut Vec<ConfigIssue>) {
        for (key, path, keys) in [
            ("api_key_file", &self.api_key_file, &mut self.api_keys),
            ("admin_key_file", &self.admin_key_file, &mut self.admin_keys),
        ] {
            match path.as_deref().map(keys_in).transpose() {
                Ok(found) => keys.extend(found.into_iter().flatten()),
                Err(message) => issues.push(ConfigIssue::new(key, message)),
            }
        }
        match self.tenants_file.as_deref().map(tenants::read).transpose() {
            Ok(found) => self.tenants.extend(found.into_iter().flatten()),
            Err(message) => issues.push(ConfigIssue::new("tenants_file", message)),
        }
    }
}

/// The keys in a file, one per line; empty lines and those that begin with `#` are skipped.
fn keys_in(path: &Path) -> Result<Vec<Secret>, String> {
    let named = path.display();
    let text = fs::read_to_string(path).map_err(|error| format!("{named}: {error}"))?;
    let lines = text.lines().map(str::trim);
    let keys = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<_> = keys.map(Secret::from).collect();
    if keys.is_empty() {
        return Err(format!("{named}: there is no key in it"));
    }
    Ok(keys)
}
