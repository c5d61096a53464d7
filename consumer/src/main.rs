//! `consumer`: applies the order system's events, each once, to a database of its own.

use std::process::ExitCode;

fn main() -> ExitCode {
    consumer::main(consumer::handlers::all())
}
