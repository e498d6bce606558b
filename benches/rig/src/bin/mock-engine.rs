//! `mock-engine`: see [`orchestra_rig::engine`].

use std::{
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::ExitCode,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use clap::Parser;
use orchestra_rig::engine::{Engine, EngineConfig, Kind, bind, control::Order};
use tokio::{net::TcpListener, runtime, task::JoinSet};

/// A mock of an OpenAI-compatible engine: computes nothing, can be checked word by word, fails on demand.
#[derive(Debug, Parser)]
#[command(name = "mock-engine", version)]
struct Cli {
    /// Whose habits it has.
    #[arg(long, value_enum, default_value = "vllm")]
    kind: Kind,
    /// The address of every listener.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// One engine on each of COUNT ports from FROM on; FROM 0 takes free ones.
    #[arg(long, value_name = "FROM:COUNT", default_value = "9000:1")]
    ports: Ports,
    /// Print one line of JSON with the ports once all are bound.
    #[arg(long)]
    print_ports: bool,
    /// The model that it says it serves.
    #[arg(long, default_value = "mock")]
    model: String,
    /// The most tokens of prompt and answer together.
    #[arg(long, default_value_t = 131_072)]
    max_model_len: u32,
    /// Words of an answer that neither `max_tokens` nor a stop string cuts short.
    #[arg(long, default_value_t = 256)]
    words: u32,
    /// Words in one event, as engines send them to a slow reader.
    #[arg(long, default_value_t = 1)]
    words_per_event: usize,
    /// Time to the first word, such as `20ms`.
    #[arg(long, value_parser = milliseconds, default_value = "0ms")]
    ttft: Duration,
    /// Time from one event to the next; zero is back to back.
    #[arg(long, value_parser = milliseconds, default_value = "0ms")]
    itl: Duration,
    /// Generation requests at once; more are refused.
    #[arg(long, default_value_t = usize::MAX)]
    max_concurrency: usize,
    /// How they are refused: 503 or 429.
    #[arg(long, default_value_t = 503)]
    busy_status: u16,
    /// Blocks of 16 tokens that the simulated prefix cache of each engine remembers; 0 is off.
    #[arg(long, default_value_t = 4096)]
    prefix_cache_blocks: usize,
    /// A fault to arm in every engine from the start, in the JSON of `POST /_control`; several are armed in order.
    #[arg(long, value_name = "JSON")]
    fault: Vec<String>,
    /// Threads; one is enough up to some 50,000 words a second.
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

/// `FROM:COUNT`.
#[derive(Clone, Copy, Debug)]
struct Ports {
    from: u16,
    count: u16,
}

impl FromStr for Ports {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (from, count) = text.split_once(':').unwrap_or((text, "1"));
        let parse = |part: &str| part.parse().map_err(|_| "not FROM:COUNT");
        let ports = Self {
            from: parse(from)?,
            count: parse(count)?,
        };
        match ports.from.checked_add(ports.count) {
            Some(_) if ports.count > 0 => Ok(ports),
            _ => Err("no such ports"),
        }
    }
}

fn milliseconds(text: &str) -> Result<Duration, &'static str> {
    let number = text
        .strip_suffix("ms")
        .ok_or("not a number of ms, such as 20ms")?;
    number
        .parse()
        .map(Duration::from_millis)
        .map_err(|_| "not a number of ms, such as 20ms")
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let builder = if cli.threads == 1 {
        runtime::Builder::new_current_thread()
    } else {
        runtime::Builder::new_multi_thread()
    };
    match run(&cli, builder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "mock-engine: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli, mut builder: runtime::Builder) -> io::Result<()> {
    let runtime = builder
        .worker_threads(cli.threads.max(1))
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let engines = start(cli)?;
        if cli.print_ports {
            let ports: Result<Vec<_>, _> = engines
                .iter()
                .map(|(_, listener)| listener.local_addr().map(|at| at.port()))
                .collect();
            writeln!(io::stdout(), "{}", serde_json::json!({ "ports": ports? }))?;
            io::stdout().flush()?;
        }
        let mut serving: JoinSet<()> = engines
            .into_iter()
            .map(|(engine, listener)| engine.serve(listener))
            .collect();
        // None of them ever ends.
        while serving.join_next().await.is_some() {}
        Ok(())
    })
}

fn start(cli: &Cli) -> io::Result<Vec<(Arc<Engine>, TcpListener)>> {
    let bad = |message| io::Error::new(io::ErrorKind::InvalidInput, message);
    let parse =
        |json: &String| serde_json::from_str::<Order>(json).map_err(|error| bad(error.to_string()));
    let orders: Vec<Order> = cli.fault.iter().map(parse).collect::<Result<_, _>>()?;
    let config = Arc::new(EngineConfig {
        kind: cli.kind,
        model: cli.model.clone(),
        max_model_len: cli.max_model_len,
        words: cli.words,
        words_per_event: cli.words_per_event.max(1),
        ttft: cli.ttft,
        itl: cli.itl,
        max_concurrency: cli.max_concurrency,
        busy_status: cli.busy_status,
        prefix_cache_blocks: cli.prefix_cache_blocks,
    });
    let start_one = |offset: u16| {
        let port = if cli.ports.from == 0 {
            0
        } else {
            cli.ports.from + offset
        };
        let listener = bind(SocketAddr::new(cli.host, port))?;
        let engine = Engine::new(Arc::clone(&config), listener.local_addr()?.port());
        for order in &orders {
            engine.control().arm(order.clone()).map_err(bad)?;
        }
        Ok((Arc::new(engine), listener))
    };
    (0..cli.ports.count).map(start_one).collect()
}
