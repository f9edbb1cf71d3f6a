// A C interface to the ExecuTorch runtime, for ctypes and JNI: open a program, run a method on arrays, read the outputs.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <executorch/devtools/etdump/etdump_flatcc.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/platform.h>

namespace executorch::extension::threadpool {
// The wheel has this class but not its header.
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
} // namespace executorch::extension::threadpool

using executorch::extension::Module;
using executorch::runtime::EValue;

namespace {
constexpr int MAX_DIMS = 8;

// The runtime says on its log why it refuses something; its error codes alone say little. The first line is the cause.
thread_local std::string first_error;

void keep_errors(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message,
                 size_t length) {
  if (first_error.empty() && (level == kError || level == kFatal)) first_error.assign(message, length);
}

const bool logging = executorch::runtime::register_pal(
    executorch::runtime::PalImpl::create(keep_errors, __FILE__));

struct Program {
  executorch::etdump::ETDumpGen* trace = nullptr;
  std::unique_ptr<Module> module;
  std::vector<EValue> outputs;
};

int fail(char* message, size_t room, const std::string& text) {
  std::snprintf(message, room, "%s", text.c_str());
  return 1;
}

std::string reason(executorch::runtime::Error error) {
  return std::string(executorch::runtime::to_string(error)) + (first_error.empty() ? "" : ": " + first_error);
}
} // namespace

extern "C" {

// `dtype` counts as in ExecuTorch's ScalarType: uint8 0, int64 4, float16 5, float32 6, bool 11.
struct expertfleet_array {
  void* data;
  int64_t sizes[MAX_DIMS];
  int32_t dims;
  int32_t dtype;
};

// Threads that operators share; the calling thread is one of them.
int expertfleet_set_threads(uint32_t threads) {
  auto* pool = executorch::extension::threadpool::get_threadpool();
  return pool && pool->_unsafe_reset_threadpool(threads) ? 0 : 1;
}

// The file is mapped, not read. With `trace` the time of every operator is kept, see expertfleet_write_trace. On failure
// null, and why in `message`.
Program* expertfleet_open(const char* path, int trace, char* message, size_t room) {
  first_error.clear();
  auto program = std::make_unique<Program>();
  std::unique_ptr<executorch::etdump::ETDumpGen> tracer;
  if (trace) tracer = std::make_unique<executorch::etdump::ETDumpGen>();
  program->trace = tracer.get();
  program->module = std::make_unique<Module>(path, Module::LoadMode::Mmap, std::move(tracer));
  const auto error = program->module->load();
  if (error != executorch::runtime::Error::Ok) {
    fail(message, room, reason(error));
    return nullptr;
  }
  return program.release();
}

// Bytes of the arena that `method` plans; negative when there is no such method.
int64_t expertfleet_arena(Program* program, const char* method) {
  const auto meta = program->module->method_meta(method);
  if (!meta.ok()) return -1;
  int64_t total = 0;
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const auto size = meta->memory_planned_buffer_size(i);
    total += size.ok() ? *size : 0;
  }
  return total;
}

// Runs `method`; the arrays must live until the next run. Returns 0, or 1 and why in `message`.
int expertfleet_run(Program* program, const char* method, const expertfleet_array* inputs, int32_t count, char* message,
                    size_t room) {
  first_error.clear();
  const auto meta = program->module->method_meta(method);
  if (!meta.ok()) return fail(message, room, reason(meta.error()));
  // The runtime would take those of the last run, which may be gone.
  if (static_cast<int32_t>(meta->num_inputs()) != count)
    return fail(message, room, std::to_string(count) + " inputs, " + std::to_string(meta->num_inputs()) + " wanted");
  std::vector<executorch::extension::TensorPtr> tensors;
  std::vector<EValue> values;
  for (int32_t i = 0; i < count; ++i) {
    const auto& input = inputs[i];
    if (input.dims < 0 || input.dims > MAX_DIMS) return fail(message, room, "too many dimensions");
    std::vector<executorch::aten::SizesType> sizes(input.sizes, input.sizes + input.dims);
    tensors.push_back(executorch::extension::from_blob(
        input.data, std::move(sizes), static_cast<executorch::aten::ScalarType>(input.dtype)));
    values.emplace_back(tensors.back());
  }
  auto result = program->module->execute(method, values);
  if (!result.ok()) return fail(message, room, reason(result.error()));
  program->outputs = std::move(*result);
  return 0;
}

int32_t expertfleet_output_count(Program* program) { return static_cast<int32_t>(program->outputs.size()); }

// Output `index` of the last run: memory of the program, overwritten by the next run.
int expertfleet_output(Program* program, int32_t index, expertfleet_array* into) {
  if (index < 0 || index >= expertfleet_output_count(program) || !program->outputs[index].isTensor()) return 1;
  const auto& tensor = program->outputs[index].toTensor();
  if (tensor.dim() > MAX_DIMS) return 1;
  into->data = const_cast<void*>(tensor.const_data_ptr());
  into->dims = static_cast<int32_t>(tensor.dim());
  into->dtype = static_cast<int32_t>(tensor.scalar_type());
  for (int32_t i = 0; i < into->dims; ++i) into->sizes[i] = tensor.size(i);
  return 0;
}

// Writes what a program opened with `trace` has kept, an ETDump.
int expertfleet_write_trace(Program* program, const char* path) {
  if (!program->trace) return 1;
  const auto dump = program->trace->get_etdump_data();
  std::FILE* file = dump.buf ? std::fopen(path, "wb") : nullptr;
  if (!file) return 1;
  const bool whole = std::fwrite(dump.buf, 1, dump.size, file) == dump.size;
  std::free(dump.buf);
  return std::fclose(file) == 0 && whole ? 0 : 1;
}

void expertfleet_close(Program* program) { delete program; }

} // extern "C"
