//! The two pipes to the runtime: lines of JSON out, a line back for each question.

use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use serde::Serialize;

use crate::error::InitError;

/// The longest answer: the container's state for its hooks.
const ANSWER_LIMIT: usize = 1 << 20;

/// What the runtime is told.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message<'a> {
    /// The process that becomes the container's, as the runtime numbers it.
    Pid(i32),
    /// The runtime is to do something and then to answer.
    Ask(&'a str),
    /// The setup failed.
    Error { message: String, errno: Option<i32> },
    /// Nothing can fail any more but the program itself.
    Ready(bool),
}

/// The line to the runtime.
#[derive(Debug)]
pub(crate) struct Runtime {
    status: File,
    answers: File,
}

impl Runtime {
    pub(crate) fn new(status: OwnedFd, answers: OwnedFd) -> Self {
        Self {
            status: File::from(status),
            answers: File::from(answers),
        }
    }

    /// The two descriptors.
    pub(crate) fn descriptors(&self) -> [RawFd; 2] {
        [self.status.as_raw_fd(), self.answers.as_raw_fd()]
    }

    /// Sends a message; a runtime that is gone is noticed when an answer is wanted.
    pub(crate) fn tell(&mut self, message: &Message<'_>) {
        if let Ok(mut line) = serde_json::to_vec(message) {
            line.push(b'\n');
            let _gone = self.status.write_all(&line);
        }
    }

    /// Asks, and returns the line that comes back.
    pub(crate) fn ask(&mut self, question: &str) -> Result<String, InitError> {
        self.tell(&Message::Ask(question));
        let mut line = Vec::new();
        let mut buffer = [0; 4096];
        while line.last() != Some(&b'\n') {
            let got = match self.answers.read(&mut buffer) {
                Ok(0) => return Err(InitError::Abandoned),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Err(InitError::Abandoned),
            };
            line.extend_from_slice(&buffer[..got]);
            if line.len() > ANSWER_LIMIT {
                return Err(InitError::Refused(
                    "the runtime's answer is too long".to_owned(),
                ));
            }
        }
        String::from_utf8(line).map_err(|_| InitError::Abandoned)
    }
}
