//! What a command prints, to whoever may stop reading: `… | head` is no error.

use std::{
    fmt::Arguments,
    io::{self, Write as _},
};

/// What a shell reports of a program that wrote to nobody: 128 and SIGPIPE.
const NOBODY_READS: i32 = 141;

/// Prints a line to standard output, as `println!` does, which panics where nobody reads: this ends the process.
#[macro_export]
macro_rules! say {
    () => { $crate::out::line(format_args!("")) };
    ($($text:tt)*) => { $crate::out::line(format_args!($($text)*)) };
}

/// See [`say!`](crate::say).
#[expect(clippy::exit, reason = "there is nobody left to tell")]
pub fn line(text: Arguments<'_>) {
    let mut out = io::stdout().lock();
    if let Err(e) = writeln!(out, "{text}") {
        if e.kind() != io::ErrorKind::BrokenPipe {
            eprintln!("cannot print: {e}");
        }
        std::process::exit(NOBODY_READS);
    }
}
