// Counts what a process changes below a folder, and lets one of these changes kill the process or fail.
//
// LD_PRELOAD puts these functions before those of libc, for Python and for libraries in C++ and Rust alike. `faults_begin`
// starts to count. The change with the number `at` ends the process by SIGKILL, or fails with an errno, and so does all
// writing after it, as on a full disk. A write is done by half first.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

enum verdict { DO, HALF, FAIL };

static char folder[4096];
static size_t folder_length;
static long at;
static int failure;  // an errno, or 0 for SIGKILL
static int log_file = -1;
static long changes;
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;  // lines are in the order of their numbers

void faults_begin(const char *path, long number, int error, int log) {
  strncpy(folder, path, sizeof folder - 1);
  at = number;
  failure = error;
  log_file = log;
  changes = 0;
  folder_length = strlen(folder);
}

static int is_below(const char *path) {
  return strncmp(path, folder, folder_length) == 0 && (path[folder_length] == '/' || path[folder_length] == 0);
}

static const char *of_file(int file, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, 4095);
  path[length < 0 ? 0 : length] = 0;
  return path;
}

static const char *absolute(int at_folder, const char *name, char *path) {
  if (name[0] == '/') return name;
  char base[4096];
  if (at_folder == AT_FDCWD) {
    if (getcwd(base, sizeof base) == NULL) base[0] = 0;
  } else {
    of_file(at_folder, base);
  }
  snprintf(path, 8192, "%s/%s", base, name);
  return path;
}

// `grows`: whether the change needs room.
static enum verdict change(const char *what, const char *path, int grows) {
  if (folder_length == 0 || !is_below(path)) return DO;
  char line[5000];
  int length = snprintf(line, sizeof line, "%s %s\n", what, path + folder_length);
  pthread_mutex_lock(&log_lock);
  long number = changes++;
  REAL(write)(log_file, line, length);
  pthread_mutex_unlock(&log_lock);
  if (number == at) return HALF;
  return at >= 0 && number > at && failure != 0 && grows ? FAIL : DO;
}

static int refused(enum verdict verdict) {
  if (verdict == DO) return 0;
  if (failure == 0) raise(SIGKILL);
  errno = failure;
  return 1;
}

#define ENDS(what, path, grows) \
  if (refused(change(what, path, grows))) return -1

static ssize_t half(enum verdict verdict, ssize_t written) {
  if (verdict == HALF && failure == 0) raise(SIGKILL);
  return written;
}

ssize_t write(int file, const void *data, size_t count) {
  char buffer[8192];
  enum verdict verdict = folder_length ? change("write", of_file(file, buffer), 1) : DO;
  if (verdict == FAIL || (verdict == HALF && count < 2)) return refused(FAIL) ? -1 : 0;
  return half(verdict, REAL(write)(file, data, verdict == HALF ? count / 2 : count));
}

ssize_t pwrite64(int file, const void *data, size_t count, off64_t offset) {
  char buffer[8192];
  enum verdict verdict = folder_length ? change("write", of_file(file, buffer), 1) : DO;
  if (verdict == FAIL || (verdict == HALF && count < 2)) return refused(FAIL) ? -1 : 0;
  return half(verdict, REAL(pwrite64)(file, data, verdict == HALF ? count / 2 : count, offset));
}

ssize_t pwrite(int file, const void *data, size_t count, off_t offset) { return pwrite64(file, data, count, offset); }

ssize_t writev(int file, const struct iovec *parts, int count) {
  char buffer[8192];
  if (folder_length) ENDS("write", of_file(file, buffer), 1);
  return REAL(writev)(file, parts, count);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t count) {
  char buffer[8192];
  if (folder_length) ENDS("write", of_file(out, buffer), 1);
  return REAL(sendfile64)(out, in, offset, count);
}

ssize_t sendfile(int out, int in, off_t *offset, size_t count) { return sendfile64(out, in, offset, count); }

ssize_t copy_file_range(int in, off64_t *in_offset, int out, off64_t *out_offset, size_t count, unsigned flags) {
  char buffer[8192];
  if (folder_length) ENDS("write", of_file(out, buffer), 1);
  return REAL(copy_file_range)(in, in_offset, out, out_offset, count, flags);
}

int ftruncate64(int file, off64_t size) {
  char buffer[8192];
  if (folder_length) ENDS("truncate", of_file(file, buffer), 1);
  return REAL(ftruncate64)(file, size);
}

int ftruncate(int file, off_t size) { return ftruncate64(file, size); }

int fsync(int file) {
  char buffer[8192];
  if (folder_length) ENDS("sync", of_file(file, buffer), 0);
  return REAL(fsync)(file);
}

static int opened(int at_folder, const char *path, int flags, mode_t mode) {
  char buffer[8192];
  if (folder_length && (flags & (O_CREAT | O_TRUNC))) ENDS("create", absolute(at_folder, path, buffer), 1);
  return REAL(openat64)(at_folder, path, flags, mode);
}

#define OPEN(at_folder)                              \
  mode_t mode = 0;                                   \
  if (flags & (O_CREAT | __O_TMPFILE)) {             \
    va_list more;                                    \
    va_start(more, flags);                           \
    mode = va_arg(more, mode_t);                     \
    va_end(more);                                    \
  }                                                  \
  return opened(at_folder, path, flags, mode)

int open(const char *path, int flags, ...) { OPEN(AT_FDCWD); }
int open64(const char *path, int flags, ...) { OPEN(AT_FDCWD); }
int openat(int at_folder, const char *path, int flags, ...) { OPEN(at_folder); }
int openat64(int at_folder, const char *path, int flags, ...) { OPEN(at_folder); }

int mkdir(const char *path, mode_t mode) {
  char buffer[8192];
  if (folder_length) ENDS("mkdir", absolute(AT_FDCWD, path, buffer), 1);
  return REAL(mkdir)(path, mode);
}

int rename(const char *from, const char *to) {
  char buffer[8192];
  if (folder_length) ENDS("rename", absolute(AT_FDCWD, from, buffer), 0);
  return REAL(rename)(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
  char buffer[8192];
  if (folder_length) ENDS("rename", absolute(from_folder, from, buffer), 0);
  return REAL(renameat)(from_folder, from, to_folder, to);
}

int unlink(const char *path) {
  char buffer[8192];
  if (folder_length) ENDS("remove", absolute(AT_FDCWD, path, buffer), 0);
  return REAL(unlink)(path);
}

int unlinkat(int at_folder, const char *path, int flags) {
  char buffer[8192];
  if (folder_length) ENDS("remove", absolute(at_folder, path, buffer), 0);
  return REAL(unlinkat)(at_folder, path, flags);
}

int rmdir(const char *path) {
  char buffer[8192];
  if (folder_length) ENDS("remove", absolute(AT_FDCWD, path, buffer), 0);
  return REAL(rmdir)(path);
}
